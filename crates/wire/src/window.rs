//! How much of an answer may be on its way: TCP's receive window.
//!
//! Linux lets a connection begin with 64 KiB, and makes that more by what was read within one round trip (`tcp_rcv_space_adjust` in
//! net/ipv4/tcp_input.c). A server sends ten segments at first (RFC 6928). Where these are large, as the 9001 bytes of most clouds, that
//! is more than it may, and a reader that is busy with what has come gets more late. With segments of 9001 bytes the first 400 KiB, as many
//! as the names of a large image have, take 5.6 ms instead of 6.5 over 1 Gbit/s and 1 ms, and 75 instead of 86 over 200 Mbit/s and 20 ms;
//! with 1500 bytes it is the server that waits, and nothing changes.

use std::os::fd::AsRawFd;

use tokio::net::TcpStream;

/// The window that a connection may open from the first answer on, in bytes: 1 Gbit/s over 8 ms. The kernel raises it as ever; what is
/// not used costs nothing. No more than half of the machine's largest (`net.ipv4.tcp_rmem`) is had.
const WINDOW_BYTES: libc::c_int = 1 << 20;

/// Opens the window of a new connection. By the least that readers are woken for (`SO_RCVLOWAT`, socket(7)), for which the kernel makes
/// room (`tcp_set_rcvlowat` in net/ipv4/tcp.c), and which is one byte again afterwards: `SO_RCVBUF` makes room too, but then it is for
/// the program to do so for ever, and `net.core.rmem_max` allows 208 KiB. A kernel that refuses it leaves things as they are.
pub(crate) fn open_wide(stream: &TcpStream) {
    set_low_water(stream, WINDOW_BYTES);
    set_low_water(stream, 1);
}

#[expect(unsafe_code, reason = "neither rustix nor socket2 has this option")]
fn set_low_water(stream: &TcpStream, bytes: libc::c_int) {
    let len = size_of_val(&bytes) as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of a number that lives, and changes a socket that is open
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            len,
        );
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::socket_recv_buffer_size;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_new_connection_has_room_for_the_window_and_wakes_its_reader_for_one_byte() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let room = |stream: &TcpStream| socket_recv_buffer_size(stream).unwrap();
        let wanted = usize::try_from(WINDOW_BYTES).unwrap();
        assert!(room(&stream) < wanted, "the kernel gives so much by itself: this shows nothing");
        open_wide(&stream);
        assert!(room(&stream) >= wanted);
        let (mut peer, _) = listener.accept().await.unwrap();
        peer.write_all(b"1").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'1');
    }
}
