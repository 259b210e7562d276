//! A registry on a loopback port, a raw HTTP client, and small images.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use lamina_image::{Descriptor, Digest, ImageConfig, Manifest, media_type};
use lamina_registry::{RegistryConfig, serve};
use lamina_store::{ImageRecord, ImageState, Store, StoreConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// No step of a test takes longer on any machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// How often registries in tests look for collectors.
pub(crate) const POLL_EVERY: Duration = Duration::from_millis(20);

pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    pub(crate) store: Store,
    directory: PathBuf,
    config: RegistryConfig,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<()>>,
    // removed with the registry
    _temporary: Option<tempfile::TempDir>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        Self::start_with(RegistryConfig::default()).await
    }

    pub(crate) async fn start_with(config: RegistryConfig) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let mut registry = Self::open(temporary.path(), config).await;
        registry._temporary = Some(temporary);
        registry
    }

    async fn open(directory: &Path, config: RegistryConfig) -> Self {
        let store = StoreConfig { poll_every: POLL_EVERY, ..StoreConfig::new(directory.join("index")) };
        let store = Store::open_directory(directory, store).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let (served, settings) = (store.clone(), config.clone());
        let serving = tokio::spawn(async move {
            serve(listener, served, settings, async { drop(stopped.await) }).await.unwrap();
        });
        let directory = directory.to_owned();
        let (stop, serving) = (Some(stop), Some(serving));
        Self { address, store, directory, config, stop, serving, _temporary: None }
    }

    /// Stops it and starts another one on the same directory.
    pub(crate) async fn restart(self) -> Self {
        self.stop().await.1.start().await
    }

    /// Stops it. Gives its directory, and what starts another one there.
    pub(crate) async fn stop(mut self) -> (PathBuf, Stopped) {
        let temporary = self._temporary.take();
        self.stop.take();
        timeout(DEADLINE, self.serving.take().unwrap()).await.unwrap().unwrap();
        let (directory, config) = (self.directory.clone(), self.config.clone());
        (directory.clone(), Stopped { directory, config, temporary })
    }

    /// Where it keeps everything.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the record of a manifest unreadable. Gives what only the inside knows of it.
    pub(crate) fn damage_manifest(&self, repo: &str, digest: Digest) -> String {
        let key = format!("repos/{repo}/manifests");
        std::fs::write(self.directory.join("objects").join(&key).join(digest.hex()), "{").unwrap();
        key
    }

    pub(crate) fn reference(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.address)
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Reply {
        send(self.address, method, path, headers, body).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, &[], "").await
    }

    pub(crate) async fn push_blob(&self, repo: &str, bytes: &Bytes) -> Descriptor {
        let digest = Digest::of(bytes);
        let path = format!("/v2/{repo}/blobs/uploads/?digest={digest}");
        self.send(Method::POST, &path, &[], bytes.clone()).await.expect(StatusCode::CREATED);
        Descriptor::named("application/octet-stream", digest, bytes.len() as u64)
    }

    pub(crate) async fn put_manifest(
        &self,
        repo: &str,
        target: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Reply {
        let path = format!("/v2/{repo}/manifests/{target}");
        self.send(Method::PUT, &path, &[("content-type", media_type)], bytes.to_vec()).await
    }

    /// Pushes an image as any client would. Gives its manifest's digest.
    pub(crate) async fn push(&self, repo: &str, tag: &str, image: &Image) -> Digest {
        for blob in image.blobs() {
            self.push_blob(repo, blob).await;
        }
        let pushed = self.put_manifest(repo, tag, media_type::OCI_MANIFEST, &image.manifest).await;
        pushed.expect(StatusCode::CREATED);
        Digest::of(&image.manifest)
    }

    /// Waits until the image has left the queue.
    pub(crate) async fn converted(&self, image: Digest) -> ImageRecord {
        let begun = Instant::now();
        while begun.elapsed() < DEADLINE {
            let record = self.store.image(image).await.unwrap();
            if let Some(record) = record.filter(|record| record.state != ImageState::Converting) {
                return record;
            }
            tokio::task::yield_now().await;
        }
        panic!("{image} is still converting after {DEADLINE:?}");
    }
}

/// A registry that was stopped.
pub(crate) struct Stopped {
    directory: PathBuf,
    config: RegistryConfig,
    temporary: Option<tempfile::TempDir>,
}

impl Stopped {
    pub(crate) async fn start(self) -> Registry {
        let mut again = Registry::open(&self.directory, self.config).await;
        again._temporary = self.temporary;
        again
    }
}

/// One request on a connection of its own.
pub(crate) async fn send(
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Reply {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let path = path.strip_prefix(&format!("http://{}", address)).unwrap_or(path);
    let mut request = Request::builder().method(method).uri(path).header("host", address.to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body.into())).unwrap();
    let response = timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap();
    let (parts, body) = response.into_parts();
    let body = timeout(DEADLINE, body.collect()).await.unwrap().unwrap().to_bytes();
    Reply { status: parts.status, headers: parts.headers, body }
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    #[track_caller]
    pub(crate) fn expect(self, status: StatusCode) -> Self {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self
    }

    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> &str {
        let value =
            self.headers.get(name).unwrap_or_else(|| panic!("no header {name} in {:?}", self.headers));
        value.to_str().unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    #[track_caller]
    pub(crate) fn refused(self, status: StatusCode, code: &str) -> String {
        let reply = self.expect(status);
        let error = reply.json()["errors"][0].clone();
        assert_eq!(error["code"], code);
        error["message"].as_str().unwrap().to_owned()
    }
}

/// A small image with gzip layers.
pub(crate) struct Image {
    pub(crate) tars: Vec<Bytes>,
    pub(crate) layers: Vec<Bytes>,
    pub(crate) config: Bytes,
    pub(crate) manifest: Bytes,
}

impl Image {
    /// One layer for each list of files.
    pub(crate) fn new(layers: &[&[(&str, &[u8])]]) -> Self {
        Self::of(layers.iter().map(|files| tar_of(files)).collect())
    }

    /// One of these layers.
    pub(crate) fn of(tars: Vec<Bytes>) -> Self {
        let layers: Vec<Bytes> = tars.iter().map(gzip).collect();
        let config = config_of(&tars, "");
        let descriptors =
            layers.iter().map(|layer| Descriptor::of("application/vnd.oci.image.layer.v1.tar+gzip", layer));
        let manifest = manifest_of(&config, descriptors.collect());
        Self { tars, layers, config, manifest: serde_json::to_vec(&manifest).unwrap().into() }
    }

    /// The same with plain layers.
    pub(crate) fn plain(layers: &[&[(&str, &[u8])]]) -> Self {
        let tars: Vec<Bytes> = layers.iter().map(|files| tar_of(files)).collect();
        let config = config_of(&tars, "");
        let descriptors = tars.iter().map(|tar| Descriptor::of(media_type::OCI_LAYER, tar));
        let manifest = serde_json::to_vec(&manifest_of(&config, descriptors.collect())).unwrap().into();
        Self { layers: tars.clone(), tars, config, manifest }
    }

    /// The same layers under another config.
    pub(crate) fn relabelled(&self, label: &str) -> Self {
        let config = config_of(&self.tars, label);
        let layers = self
            .layers
            .iter()
            .map(|layer| Descriptor::of("application/vnd.oci.image.layer.v1.tar+gzip", layer));
        let manifest = serde_json::to_vec(&manifest_of(&config, layers.collect())).unwrap().into();
        Self { tars: self.tars.clone(), layers: self.layers.clone(), config, manifest }
    }

    pub(crate) fn blobs(&self) -> impl Iterator<Item = &Bytes> {
        self.layers.iter().chain([&self.config])
    }

    /// Writes the image as an OCI layout, under the tag `v1`.
    pub(crate) fn write_layout(&self, directory: &Path) {
        let blobs = directory.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        for blob in self.blobs().chain([&self.manifest]) {
            std::fs::write(blobs.join(Digest::of(blob).hex()), blob).unwrap();
        }
        std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": media_type::OCI_MANIFEST,
            "digest": Digest::of(&self.manifest).to_string(),
            "size": self.manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": "v1" },
        }]});
        std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
    }
}

pub(crate) fn tar_of(files: &[(&str, &[u8])]) -> Bytes {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, path, *contents).unwrap();
    }
    builder.into_inner().unwrap().into()
}

pub(crate) fn gzip(bytes: &Bytes) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap().into()
}

pub(crate) fn config_of(tars: &[Bytes], label: &str) -> Bytes {
    let diff_ids: Vec<Digest> = tars.iter().map(|tar| Digest::of(tar)).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "author": label,
        "config": { "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let bytes = Bytes::from(config.to_string());
    serde_json::from_slice::<ImageConfig>(&bytes).unwrap();
    bytes
}

pub(crate) fn manifest_of(config: &Bytes, layers: Vec<Descriptor>) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::of(media_type::OCI_CONFIG, config),
        layers,
        subject: None,
        annotations: Default::default(),
    }
}

/// Runs a program to its end, on a thread that may wait for it, and says what it printed where it fails.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> String {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).kill_on_drop(true);
    let output = timeout(DEADLINE, command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
