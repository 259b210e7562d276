//! The daemon: one cache, many mounts, a control socket.
