//! Whom a client trusts, and who it is.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::access::{Access, HostAccess};

/// The settings for the registry at `host`. *Errors*: a file that cannot be used, named.
pub(crate) fn client_tls(access: &Access, host: &str) -> Result<ClientConfig, String> {
    let special = access.hosts.get(host).cloned().unwrap_or_default();
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let believed = match special.skip_verify {
        true => {
            tracing::warn!(host, "its certificate may be anything: skip_verify is set for it");
            Believed::Everybody
        }
        false => Believed::Trusted { named: named_roots(access, &special)?, verifier: OnceLock::new() },
    };
    let builder =
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Judge { believed, provider }));
    let Some(client) = &special.client else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(&client.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&client.key);
    let key = key.map_err(|error| format!("the private key in {}: {error}", client.key.display()))?;
    let wrong = |error| format!("the client certificate {}: {error}", client.certificate.display());
    builder.with_client_auth_cert(chain, key).map_err(wrong)
}

/// Whom the settings trust beside the system.
fn named_roots(access: &Access, special: &HostAccess) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for path in access.ca.iter().chain(&special.ca) {
        for certificate in certificates(path)? {
            let added = roots.add(certificate);
            added.map_err(|error| format!("the certificate in {}: {error}", path.display()))?;
        }
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let failed = |error| format!("the certificate in {}: {error}", path.display());
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(failed)?.collect();
    let found = found.map_err(failed)?;
    if found.is_empty() {
        return Err(format!("there is no certificate in {}", path.display()));
    }
    Ok(found)
}

/// Whose certificates are believed.
#[derive(Debug)]
enum Believed {
    /// Everybody's. Only where somebody wrote `skip_verify`.
    Everybody,
    /// Those signed by whom the system trusts, or the settings name. The system's certificates are read when the first server
    /// shows one: 10 ms that a mount over plain HTTP does without.
    Trusted {
        named: RootCertStore,
        /// `None` where nobody at all is trusted.
        verifier: OnceLock<Option<Arc<WebPkiServerVerifier>>>,
    },
}

#[derive(Debug)]
struct Judge {
    believed: Believed,
    provider: Arc<CryptoProvider>,
}

/// Trusts whom the system trusts, beside those named.
fn verifier(named: &RootCertStore, provider: &Arc<CryptoProvider>) -> Option<Arc<WebPkiServerVerifier>> {
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::debug!(%error, "some of the system's certificates cannot be read");
    }
    let mut roots = named.clone();
    roots.add_parsable_certificates(native.certs);
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build().ok()
}

impl ServerCertVerifier for Judge {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let trusted = match &self.believed {
            Believed::Everybody => return Ok(ServerCertVerified::assertion()),
            Believed::Trusted { named, verifier: read } => {
                read.get_or_init(|| verifier(named, &self.provider))
            }
        };
        let trusted = trusted.as_ref().ok_or(CertificateError::UnknownIssuer)?;
        trusted.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
