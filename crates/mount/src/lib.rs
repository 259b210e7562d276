//! A FUSE file system over a tree and a cache.
