//! A registry that misbehaves on request: a proxy before a real one, which changes, cuts off, refuses or never answers.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use lamina_testkit::process::until;

use crate::rig::DEADLINE;

/// How long an answer that pauses does.
const PAUSE: Duration = Duration::from_secs(4);

/// What becomes of one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It passes as it is.
    None,
    /// It never comes.
    Hang,
    /// Its second half is missing.
    Cut,
    /// Its last byte is another one.
    Flip,
    /// Its first byte is.
    FlipFirst,
    /// It pauses behind the first place where it has these.
    PauseBehind(&'static [u8]),
    /// The first byte behind the last place where it has these is another one.
    FlipBehind(&'static [u8]),
    /// The registry is not even asked; this status comes instead.
    Status(u16),
    /// The same with these bytes, as if they were right.
    Say(&'static [u8]),
}

/// The head of a request.
pub(crate) struct Request {
    /// `GET /v2/…`
    pub(crate) line: String,
    /// Whether it asks for a range, of anything but a tree: of a pack.
    pub(crate) ranged: bool,
    /// All of it, the same whenever the same is asked.
    pub(crate) head: Vec<u8>,
    body: Vec<u8>,
}

impl Request {
    /// Whether its head has these words, written as is usual or small.
    pub(crate) fn says(&self, what: &str) -> bool {
        String::from_utf8_lossy(&self.head).to_ascii_lowercase().contains(what)
    }
}

/// Digests of trees that were seen in documents.
type Trees = Mutex<Vec<String>>;

fn lock(trees: &Trees) -> MutexGuard<'_, Vec<String>> {
    trees.lock().expect("no thread panics with it")
}

type Policy = dyn Fn(&Request) -> Fault + Send + Sync;

/// The proxy. Its threads end with the process.
pub(crate) struct Proxy {
    pub(crate) address: String,
    faults: Arc<AtomicUsize>,
}

impl Proxy {
    /// Serves on a free loopback port what `upstream` serves, but for what `policy` says of each request.
    pub(crate) fn start(
        upstream: &str,
        policy: impl Fn(&Request) -> Fault + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let faults = Arc::new(AtomicUsize::new(0));
        let (policy, counter, upstream): (Arc<Policy>, _, _) =
            (Arc::new(policy), Arc::clone(&faults), upstream.to_owned());
        let trees = Arc::<Trees>::default();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (policy, counter, upstream, trees) =
                    (Arc::clone(&policy), Arc::clone(&counter), upstream.clone(), Arc::clone(&trees));
                // a client that goes away ends its thread with an error
                std::thread::spawn(move || serve(stream, &upstream, &*policy, &counter, &trees));
            }
        });
        Ok(Self { address, faults })
    }

    /// Serves what `upstream` serves, but for ranges, which are never answered as long as the flag is set. It is set.
    pub(crate) fn hanging(upstream: &str) -> Result<(Self, Arc<AtomicBool>)> {
        let hanging = Arc::new(AtomicBool::new(true));
        let policy = Arc::clone(&hanging);
        let proxy =
            Self::start(upstream, move |request| match request.ranged && policy.load(Ordering::SeqCst) {
                true => Fault::Hang,
                false => Fault::None,
            })?;
        Ok((proxy, hanging))
    }

    /// A reference that leads here.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// How many answers were faulty so far.
    pub(crate) fn faults(&self) -> usize {
        self.faults.load(Ordering::SeqCst)
    }

    /// Waits for a first faulty answer.
    pub(crate) fn faulted(&self) -> Result<()> {
        until("a fault", DEADLINE, || Ok((self.faults() > 0).then_some(())))
    }
}

/// One connection, one request.
fn serve(
    stream: TcpStream,
    upstream: &str,
    policy: &Policy,
    faults: &AtomicUsize,
    trees: &Trees,
) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = read_request(&mut reader)?;
    request.ranged &= !lock(trees).iter().any(|tree| request.line.contains(tree));
    let fault = policy(&request);
    let mut stream = stream;
    if fault != Fault::None {
        faults.fetch_add(1, Ordering::SeqCst);
    }
    match fault {
        Fault::Status(status) => {
            let head = format!("HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes())?;
        }
        Fault::Say(body) => {
            let len = body.len();
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n")?;
            stream.write_all(body)?;
        }
        Fault::Hang => {
            // until the client has had enough
            while reader.read(&mut [0; 1024])? > 0 {}
        }
        Fault::None
        | Fault::Cut
        | Fault::Flip
        | Fault::FlipFirst
        | Fault::FlipBehind(_)
        | Fault::PauseBehind(_) => {
            let mut answer = ask(upstream, &request)?;
            lock(trees).extend(trees_named_in(&answer));
            let head = find(&answer, b"\r\n\r\n").context("an answer without an end of its head")? + 4;
            match fault {
                Fault::Cut => answer.truncate(head + (answer.len() - head) / 2),
                Fault::FlipFirst => answer[head] ^= 1,
                Fault::FlipBehind(what) => {
                    let last = answer.windows(what.len()).rposition(|window| window == what);
                    answer[last.context("it has them")? + what.len()] ^= 1;
                }
                Fault::Flip => *answer.last_mut().context("not empty")? ^= 1,
                _ => {}
            }
            if let Fault::PauseBehind(what) = fault {
                let at = find(&answer, what).context("it has them")? + what.len();
                stream.write_all(&answer[..at])?;
                answer.drain(..at);
                std::thread::park_timeout(PAUSE);
            }
            stream.write_all(&answer)?;
        }
    }
    Ok(())
}

fn read_request(reader: &mut impl BufRead) -> Result<Request> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut request = Request {
        line: line.trim_end_matches(" HTTP/1.1\r\n").to_owned(),
        ranged: false,
        head: line.into_bytes(),
        body: Vec::new(),
    };
    let mut length = 0;
    loop {
        let mut field = String::new();
        reader.read_line(&mut field)?;
        let (name, value) = field.split_once(':').unwrap_or((field.trim_end(), ""));
        match name.to_ascii_lowercase().as_str() {
            "" => break,
            "connection" => continue,
            "range" => request.ranged = true,
            "content-length" => length = value.trim().parse()?,
            _ => {}
        }
        request.head.extend_from_slice(field.as_bytes());
    }
    request.head.extend_from_slice(b"Connection: close\r\n\r\n");
    reader.take(length).read_to_end(&mut request.body)?;
    Ok(request)
}

/// The registry's answer, head and all.
fn ask(upstream: &str, request: &Request) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream)?;
    stream.write_all(&request.head)?;
    stream.write_all(&request.body)?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error.into()),
        _ => Ok(answer),
    }
}

/// The digests of trees that manifests and artifacts name.
fn trees_named_in(answer: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(answer);
    let named = text.split("\"dev.lamina.tree\":\"").skip(1);
    named.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())).collect()
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}
