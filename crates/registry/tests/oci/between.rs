//! What stands between a registry and its upstream: it counts what is asked, and misbehaves on demand.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What becomes of one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Its second half comes only once it is let go.
    Hold,
    /// Its second half is missing.
    Cut,
    /// Its last byte is another one.
    Flip,
    /// This status comes instead.
    Status(u16),
    /// These bytes come instead, as if they were right.
    Say(&'static [u8]),
}

type Policy = Box<dyn Fn(&str) -> Fault + Send + Sync>;

struct Shared {
    upstream: SocketAddr,
    policy: Mutex<Policy>,
    asked: Mutex<Vec<String>>,
    held: watch::Sender<bool>,
}

pub(crate) struct Between {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Between {
    pub(crate) async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let policy: Mutex<Policy> = Mutex::new(Box::new(|_| Fault::None));
        let (asked, held) = (Mutex::default(), watch::Sender::new(true));
        let shared = Arc::new(Shared { upstream, policy, asked, held });
        let passing = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // a client that goes away ends it with an error
                tokio::spawn(pass(client, Arc::clone(&passing)));
            }
        });
        Self { address, shared, accepting }
    }

    /// From now on answers to requests are treated so; a request is shown as `GET /v2/…`.
    pub(crate) fn treat(&self, policy: impl Fn(&str) -> Fault + Send + Sync + 'static) {
        *self.shared.policy.lock().unwrap() = Box::new(policy);
    }

    /// Lets go what is held.
    pub(crate) fn let_go(&self) {
        self.shared.held.send_replace(false);
    }

    /// How often something was asked whose line contains this.
    pub(crate) fn asked(&self, part: &str) -> usize {
        self.shared.asked.lock().unwrap().iter().filter(|line| line.contains(part)).count()
    }

    /// Nobody is here any more.
    pub(crate) async fn end(&mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
    }
}

/// One connection, one request.
async fn pass(client: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().replace(" HTTP/1.1", "");
    let ranged = String::from_utf8_lossy(&head).to_lowercase().contains("\r\nrange:");
    let line = if ranged { line + " in part" } else { line };
    shared.asked.lock().unwrap().push(line.clone());
    let fault = shared.policy.lock().unwrap()(&line);
    if let Fault::Status(status) = fault {
        let answer = format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        return client.write_all(answer.as_bytes()).await;
    }
    if let Fault::Say(body) = fault {
        let len = body.len();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n");
        client.write_all(answer.as_bytes()).await?;
        return client.write_all(body).await;
    }
    head.truncate(head.len() - 2);
    head.extend_from_slice(b"connection: close\r\n\r\n");
    let mut server = TcpStream::connect(shared.upstream).await?;
    server.write_all(&head).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").map_or(answer.len(), |end| end + 4);
    let half = body + (answer.len() - body) / 2;
    match fault {
        Fault::Cut => answer.truncate(half),
        Fault::Flip if body < answer.len() => *answer.last_mut().unwrap() ^= 1,
        Fault::Hold => {
            client.write_all(&answer[..half]).await?;
            client.flush().await?;
            let _ = shared.held.subscribe().wait_for(|held| !held).await;
            answer.drain(..half);
        }
        _ => {}
    }
    client.write_all(&answer).await?;
    client.shutdown().await
}
