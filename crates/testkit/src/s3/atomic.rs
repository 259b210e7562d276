//! `s3s-fs` with what Amazon does at once done at once.

use std::path::{Path, PathBuf};

use anyhow::Result;
use s3s::dto::*;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::sync::Mutex;

use super::file;

/// Keys in one answer of a list, as Amazon has it.
const KEYS_MAX: usize = 1000;

/// See the module above.
#[derive(Debug)]
pub(super) struct Atomic {
    inner: FileSystem,
    root: PathBuf,
    /// Held by each write that looks first.
    conditional: Mutex<()>,
}

impl Atomic {
    pub(super) fn new(root: &Path) -> Result<Self> {
        let inner = FileSystem::new(root).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        Ok(Self { inner, root: root.to_owned(), conditional: Mutex::new(()) })
    }
}

/// Methods that are passed on as they are.
macro_rules! pass {
    ($($method:ident: $input:ty => $output:ty),* $(,)?) => {
        $(
            fn $method<'life, 'fut>(
                &'life self,
                request: S3Request<$input>,
            ) -> std::pin::Pin<Box<dyn Future<Output = S3Result<S3Response<$output>>> + Send + 'fut>>
            where
                'life: 'fut,
                Self: 'fut,
            {
                self.inner.$method(request)
            }
        )*
    };
}

#[async_trait::async_trait]
impl S3 for Atomic {
    pass! {
        abort_multipart_upload: AbortMultipartUploadInput => AbortMultipartUploadOutput,
        create_multipart_upload: CreateMultipartUploadInput => CreateMultipartUploadOutput,
        upload_part: UploadPartInput => UploadPartOutput,
        get_object: GetObjectInput => GetObjectOutput,
        head_object: HeadObjectInput => HeadObjectOutput,
        head_bucket: HeadBucketInput => HeadBucketOutput,
        delete_object: DeleteObjectInput => DeleteObjectOutput,
        delete_objects: DeleteObjectsInput => DeleteObjectsOutput,
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        if !self.root.join(&request.input.bucket).is_dir() {
            return Err(s3_error!(NoSuchBucket));
        }
        let looks = request.input.if_none_match.is_some() || request.input.if_match.is_some();
        let _lock = if looks { Some(self.conditional.lock().await) } else { None };
        self.inner.put_object(request).await
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.inner.complete_multipart_upload(request).await
    }

    async fn copy_object(
        &self,
        request: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let CopySource::Bucket { bucket, key, .. } = &request.input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        let from = file(&self.root, bucket, key);
        let to = file(&self.root, &request.input.bucket, &request.input.key);
        let copied = tokio::task::spawn_blocking(move || copy(&from, &to)).await;
        match copied.map_err(|_| s3_error!(InternalError))? {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(s3_error!(NoSuchKey)),
            Err(_) => return Err(s3_error!(InternalError)),
        }
        let result = CopyObjectResult {
            last_modified: Some(Timestamp::from(std::time::SystemTime::now())),
            e_tag: Some(ETag::Strong("copied".to_owned())),
            ..Default::default()
        };
        Ok(S3Response::new(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() }))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let ListObjectsV2Input { bucket, prefix, delimiter, continuation_token, start_after, .. } =
            request.input;
        let (root, prefix) = (self.root.join(&bucket), prefix.unwrap_or_default());
        let delimited = delimiter.is_some();
        let walked = tokio::task::spawn_blocking({
            let prefix = prefix.clone();
            move || walk(&root, &prefix, delimited)
        });
        let mut found = walked.await.map_err(|_| s3_error!(InternalError))?;
        found.sort_by(|one, other| one.0.cmp(&other.0));
        let after = continuation_token.clone().max(start_after.clone()).unwrap_or_default();
        found.retain(|(key, _)| *key > after);
        let more = found.len() > KEYS_MAX;
        found.truncate(KEYS_MAX);
        let next = if more { found.last().map(|(key, _)| key.clone()) } else { None };
        let (contents, prefixes): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(_, object)| object.is_some());
        let prefixes = prefixes.into_iter().map(|(key, _)| CommonPrefix { prefix: Some(key) });
        let output = ListObjectsV2Output {
            key_count: i32::try_from(contents.len()).ok(),
            max_keys: i32::try_from(KEYS_MAX).ok(),
            is_truncated: Some(more),
            contents: Some(contents.into_iter().filter_map(|(_, object)| object).collect()),
            common_prefixes: Some(prefixes.collect()),
            next_continuation_token: next,
            continuation_token,
            start_after,
            delimiter,
            name: Some(bucket),
            prefix: Some(prefix),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }
}

/// Makes `to` a new object with the bytes of `from`: nobody sees half of it.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let directory = to.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(directory)?;
    let root = from.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    let new = tempfile::Builder::new().prefix(".copy").tempfile_in(root)?;
    std::fs::copy(from, new.path())?;
    new.persist(to).map_err(|error| error.error)?;
    Ok(())
}

/// Every object below a prefix; with `delimited`, only those directly below it, and `None` for each directory.
fn walk(root: &Path, prefix: &str, delimited: bool) -> Vec<(String, Option<Object>)> {
    let mut found = Vec::new();
    let above = prefix.rsplit_once('/').map_or("", |(above, _)| above);
    let mut open = vec![root.join(above)];
    while let Some(directory) = open.pop() {
        // gone meanwhile, or never there
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            let key = path.strip_prefix(root).ok().and_then(Path::to_str).unwrap_or_default().to_owned();
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                let below = format!("{key}/");
                if delimited && below.starts_with(prefix) {
                    found.push((below, None));
                } else if below.starts_with(prefix) || prefix.starts_with(&below) {
                    open.push(path);
                }
            } else if key.starts_with(prefix) && !key.contains(".copy") {
                found.push((key.clone(), Some(object(key, &metadata))));
            }
        }
    }
    found
}

fn object(key: String, metadata: &std::fs::Metadata) -> Object {
    let modified = metadata.modified().unwrap_or(std::time::SystemTime::UNIX_EPOCH);
    Object {
        key: Some(key),
        last_modified: Some(Timestamp::from(modified)),
        size: i64::try_from(metadata.len()).ok(),
        ..Default::default()
    }
}
