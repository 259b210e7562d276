use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::{Link, LinkSpec};

const SPEC: LinkSpec = LinkSpec { rate_mbit: 1000.0, delay_one_way: Duration::from_millis(5) };
const PORT: u16 = 7;

/// A connection through the link: the node's end, then the server's.
fn connect(link: &Link) -> (TcpStream, TcpStream) {
    let address = SocketAddr::from((link.server().address(), PORT));
    let listener = link.server().enter(|| TcpListener::bind(address)).unwrap().unwrap();
    let node = link.node().enter(|| TcpStream::connect(address)).unwrap().unwrap();
    let (server, _) = listener.accept().unwrap();
    node.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    (node, server)
}

#[test]
fn a_round_trip_takes_twice_the_delay() {
    let link = Link::new(SPEC).unwrap();
    let (mut node, mut server) = connect(&link);
    let mut byte = [0];
    let fastest = (0..10)
        .map(|_| {
            let start = Instant::now();
            node.write_all(b"?").unwrap();
            server.read_exact(&mut byte).unwrap();
            server.write_all(b"!").unwrap();
            node.read_exact(&mut byte).unwrap();
            start.elapsed()
        })
        .min()
        .unwrap();
    assert!(fastest >= Duration::from_millis(10), "{fastest:?}");
    assert!(fastest < Duration::from_millis(14), "{fastest:?}");
}

#[test]
fn nothing_is_faster_than_the_wire_and_every_byte_is_counted() {
    let spec = LinkSpec { rate_mbit: 400.0, ..SPEC };
    let link = Link::new(spec).unwrap();
    let (mut node, mut server) = connect(&link);
    let total = 20 << 20;
    let start = Instant::now();
    let writer = std::thread::spawn(move || server.write_all(&vec![7; total]).map(|()| server));
    let mut received = vec![0; total];
    node.read_exact(&mut received).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    writer.join().unwrap().unwrap();
    let least = total as f64 * 8.0 / (spec.rate_mbit * 1e6);
    assert!(seconds >= least, "{seconds} s for what takes {least} s");
    assert!(link.received() >= total as u64 && link.received() < (total + total / 20) as u64);
    assert!(link.sent() > 0 && link.sent() < link.received() / 10, "{}", link.sent());
}

#[test]
fn a_dropped_link_leaves_no_namespace() {
    let link = Link::new(SPEC).unwrap();
    let other = Link::new(SPEC).unwrap();
    let paths = [link.server().path(), link.node().path(), other.server().path(), other.node().path()];
    assert!(paths.iter().all(|path| path.exists()));
    drop((link, other));
    assert!(!paths.iter().any(|path| path.exists()), "{paths:?}");
}

#[test]
fn a_command_runs_inside() {
    let link = Link::new(SPEC).unwrap();
    let output = link.node().command("ip").args(["-o", "-4", "addr"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&Ipv4Addr::new(10, 77, 0, 2).to_string()), "{text}");
}

#[test]
fn a_link_without_a_rate_is_refused() {
    for rate_mbit in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(Link::new(LinkSpec { rate_mbit, ..SPEC }).is_err());
    }
}
