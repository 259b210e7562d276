//! TLS for a registry, with certificates that are read again when they change.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// How often the files are looked at: whoever renews a certificate does so days before its end.
const LOOK: Duration = Duration::from_secs(2);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct TlsError {
    path: PathBuf,
    reason: String,
}

/// A registry's certificate and key, from PEM files.
#[derive(Debug)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    current: Arc<Current>,
    changed: RwLock<Option<[SystemTime; 2]>>,
    config: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read()))
    }
}

impl Tls {
    /// Reads the files. The certificate's is followed by those that lead to its authority. Blocks.
    pub fn open(certificate: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        let read = read(&certificate, &key)?;
        let changed = RwLock::new(changed(&certificate, &key));
        let current = Arc::new(Current(RwLock::new(Arc::new(read))));
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().expect("the provider has both versions");
        let resolver = Arc::clone(&current);
        let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { certificate, key, current, changed, config: Arc::new(config) })
    }

    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        TlsAcceptor::from(Arc::clone(&self.config)).accept(stream).await
    }

    /// Reads the files again whenever they change. What cannot be used is logged, and the last good ones stay.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = changed(&self.certificate, &self.key);
            if *self.changed.read() == now {
                continue;
            }
            *self.changed.write() = now;
            match read(&self.certificate, &self.key) {
                Ok(read) => {
                    *self.current.0.write() = Arc::new(read);
                    tracing::info!(certificate = %self.certificate.display(), "the certificate was read again");
                }
                Err(error) => tracing::error!(%error, "the certificate stays as it was"),
            }
        }
    }
}

fn changed(certificate: &Path, key: &Path) -> Option<[SystemTime; 2]> {
    let one = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    Some([one(certificate)?, one(key)?])
}

fn read(certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let failed = |path: &Path, reason: String| TlsError { path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| failed(certificate, format!("no certificate: {error}")))?;
    if chain.is_empty() {
        return Err(failed(certificate, "there is no certificate in it".to_owned()));
    }
    let private = PrivateKeyDer::from_pem_file(key);
    let private = private.map_err(|error| failed(key, format!("no private key: {error}")))?;
    // this also sees whether they belong together
    CertifiedKey::from_der(chain, private, &ring::default_provider())
        .map_err(|error| failed(certificate, format!("it cannot be used with {}: {error}", key.display())))
}
