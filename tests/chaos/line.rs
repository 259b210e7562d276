//! The line to the registry: bytes pass, slowly, changed, or not at all.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;

/// What the line does to what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weather {
    Fine,
    /// Connections break, and new ones break as well.
    Cut,
    /// A piece of 16 KiB takes 20 ms.
    Slow,
    /// One byte of every fourth piece is another.
    Lies,
}

struct Shared {
    upstream: Mutex<String>,
    weather: AtomicU8,
    pieces: AtomicU64,
}

/// The line. Its threads end with the process.
pub(crate) struct Line {
    pub(crate) address: String,
    shared: Arc<Shared>,
}

impl Line {
    pub(crate) fn start(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared {
            upstream: Mutex::new(upstream.to_owned()),
            weather: AtomicU8::new(0),
            pieces: AtomicU64::new(0),
        });
        let of = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = Arc::clone(&of);
                std::thread::spawn(move || connect(&shared, client));
            }
        });
        Ok(Self { address, shared })
    }

    /// The registry is elsewhere now.
    pub(crate) fn lead_to(&self, upstream: &str) {
        *self.shared.upstream.lock().expect("no thread panics with it") = upstream.to_owned();
    }

    pub(crate) fn set(&self, weather: Weather) {
        self.shared.weather.store(weather as u8, Ordering::SeqCst);
    }
}

impl Shared {
    fn is(&self, weather: Weather) -> bool {
        self.weather.load(Ordering::SeqCst) == weather as u8
    }
}

fn connect(shared: &Arc<Shared>, client: TcpStream) -> Result<()> {
    let upstream = shared.upstream.lock().expect("no thread panics with it").clone();
    let server = TcpStream::connect(upstream)?;
    let (up, down) = ((client.try_clone()?, server.try_clone()?), (server, client));
    let other = Arc::clone(shared);
    std::thread::spawn(move || pass(&other, up.0, up.1, false));
    pass(shared, down.0, down.1, true);
    Ok(())
}

/// Passes bytes on until one end is closed, or the line is cut.
fn pass(shared: &Shared, mut from: TcpStream, mut to: TcpStream, answers: bool) {
    // looks at the weather now and then even when nothing passes
    let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
    let mut bytes = [0; 16 << 10];
    while !shared.is(Weather::Cut) {
        let len = match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => continue,
            Err(_) => break,
        };
        if shared.is(Weather::Slow) {
            std::thread::park_timeout(Duration::from_millis(20));
        }
        let piece = shared.pieces.fetch_add(1, Ordering::Relaxed);
        if answers && shared.is(Weather::Lies) && piece.is_multiple_of(4) {
            bytes[len - 1] ^= 1;
        }
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
