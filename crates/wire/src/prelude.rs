//! The prelude of an image: its manifest, and in the same answer what its mount needs next.
//!
//! It is what a Lamina registry answers to a client that says it takes one, by the `Accept` header with which all ask for manifests
//! (RFC 9110, 12.5.1). Any other registry answers with the manifest alone.

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use http::{Request, StatusCode, header};
use lamina_image::{CommandKey, Descriptor, PRELUDE_LENGTH_BYTES, PreludeHead, media_type};
use tokio::sync::oneshot;

use crate::client::{MANIFESTS, media_type_of};
use crate::http_call::{Answer, Payload};
use crate::{Client, Fetched, Version, WireError};

/// Names the command that is to start, as [`CommandKey`] has it, so that its own boot pack comes.
pub const COMMAND_HEADER: &str = "lamina-command";

/// More than that is not passed over: what comes behind it is sooner there if it is asked for.
const PASSED_OVER_BYTES_MAX: u64 = 1 << 20;

/// The bytes of one part of a prelude as they come. They are not verified: whoever knows what they are does that.
pub type PartStream = BoxStream<'static, Result<Bytes, WireError>>;

/// What comes behind the manifest, over the same connection.
pub struct Prelude {
    body: Body,
    parts: Vec<Descriptor>,
}

impl std::fmt::Debug for Prelude {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.parts).finish()
    }
}

impl Prelude {
    /// The first part of each of these media types, where it comes, and in this order. All else is passed over. A part begins when those
    /// before it have been read, or dropped in their turn: who drops one earlier ends those behind it.
    pub fn split<const N: usize>(self, media_types: [&str; N]) -> [Option<(Descriptor, PartStream)>; N] {
        let url = self.body.url.clone();
        let (first, mut turn) = oneshot::channel();
        // it is there to be taken
        let _ = first.send(self.body);
        let mut parts = self.parts.into_iter();
        media_types.map(|media_type| {
            let mut skip = 0;
            let mut rest = parts.clone();
            let part = rest.find(|part| {
                let found = part.media_type == media_type;
                skip += if found { 0 } else { part.size };
                found
            })?;
            if skip > PASSED_OVER_BYTES_MAX {
                return None;
            }
            parts = rest;
            let (next, after) = oneshot::channel();
            let turn = Some(std::mem::replace(&mut turn, after));
            let (url, left, next) = (url.clone(), part.size, Some(next));
            let reader = PartReader { url, turn, body: None, skip, left, next };
            let pieces = stream::try_unfold(reader, |mut reader| async move {
                let piece = reader.next().await?;
                Ok(piece.map(|piece| (piece, reader)))
            });
            Some((part, pieces.boxed()))
        })
    }
}

impl Client {
    /// The manifest or index of an image, and where the registry gives one, its prelude for a start of `command`. One request.
    pub async fn prelude(
        &self,
        repository: &str,
        version: &Version,
        command: Option<&CommandKey>,
    ) -> Result<(Fetched, Option<Prelude>), WireError> {
        let url = self.manifest_url(repository, version);
        let accept = [&MANIFESTS[..], &[media_type::PRELUDE]].concat().join(", ");
        let asked = self.retrying(|| async {
            let mut request = Request::get(&url).header(header::ACCEPT, &accept);
            if let Some(command) = command {
                request = request.header(COMMAND_HEADER, command.as_str());
            }
            let answer = match self.call(request, Payload::Empty).await?.expect(&[StatusCode::OK]).await {
                Err(WireError::Status { status: 400 | 406 | 415, .. }) => return Ok(None),
                answer => answer?,
            };
            if media_type_of(&answer) != media_type::PRELUDE {
                return Ok(Some((Fetched::from_answer(answer, version).await?, None)));
            }
            match begin(answer, version).await {
                Err(error @ (WireError::Answer { .. } | WireError::Unreachable { .. })) => {
                    tracing::debug!(%error, "not a prelude");
                    Ok(None)
                }
                begun => begun.map(Some),
            }
        });
        match asked.await? {
            Some(answered) => Ok(answered),
            // whoever it is does not speak as we do, and is asked as all others are
            None => Ok((self.manifest(repository, version).await?, None)),
        }
    }
}

/// Reads a prelude up to its manifest.
async fn begin(answer: Answer, version: &Version) -> Result<(Fetched, Option<Prelude>), WireError> {
    let url = answer.url.clone();
    let wrong = |reason: String| WireError::Answer { url: url.clone(), reason };
    let mut body = Body { url: url.clone(), pieces: answer.stream(), rest: Bytes::new(), skip: 0 };
    let length = body.read(PRELUDE_LENGTH_BYTES).await?;
    let length = PreludeHead::length(length[..].try_into().expect("as many were read"));
    let head = body.read(length.ok_or_else(|| wrong("the head of its prelude is too long".into()))?).await?;
    let head = PreludeHead::parse(&head).map_err(|error| wrong(error.to_string()))?;
    let manifest = head.manifest();
    let bytes = body.read(usize::try_from(manifest.size).expect("a few MiB at most")).await?;
    let fetched = Fetched::checked(url, manifest.media_type.clone(), bytes, version)?;
    Ok((fetched, Some(Prelude { body, parts: head.behind().to_vec() })))
}

/// The body of an answer, of which something has been read.
struct Body {
    url: String,
    pieces: PartStream,
    /// What comes next, as it came with what was read,
    rest: Bytes,
    /// once so many bytes have been passed over.
    skip: u64,
}

impl Body {
    /// The next piece, cut off behind `max` bytes. *Errors*: there is none.
    async fn piece(&mut self, max: u64) -> Result<Bytes, WireError> {
        loop {
            let passed = usize::try_from(self.skip).unwrap_or(usize::MAX).min(self.rest.len());
            let _ = self.rest.split_to(passed);
            self.skip -= passed as u64;
            if !self.rest.is_empty() {
                let len = usize::try_from(max).unwrap_or(usize::MAX).min(self.rest.len());
                return Ok(self.rest.split_to(len));
            }
            self.rest = self.pieces.try_next().await?.ok_or_else(|| broken_off(&self.url))?;
        }
    }

    /// The next `len` bytes, which are few.
    async fn read(&mut self, len: usize) -> Result<Bytes, WireError> {
        let mut read = BytesMut::with_capacity(len);
        while read.len() < len {
            read.extend_from_slice(&self.piece((len - read.len()) as u64).await?);
        }
        Ok(read.freeze())
    }
}

fn broken_off(url: &str) -> WireError {
    WireError::Unreachable { url: url.to_owned(), reason: "the prelude broke off".to_owned() }
}

/// Reads one part, and hands the body on to the next at its end, or when it is dropped.
struct PartReader {
    url: String,
    turn: Option<oneshot::Receiver<Body>>,
    body: Option<Body>,
    /// What is passed over before it, in bytes.
    skip: u64,
    left: u64,
    next: Option<oneshot::Sender<Body>>,
}

impl PartReader {
    async fn next(&mut self) -> Result<Option<Bytes>, WireError> {
        if self.left == 0 {
            return Ok(None);
        }
        if let Some(turn) = &mut self.turn {
            // whoever was before has met an error, and said so
            let body = self.body.insert(turn.await.map_err(|_| broken_off(&self.url))?);
            body.skip += self.skip;
            self.turn = None;
        }
        let body = self.body.as_mut().expect("its turn has come");
        let piece = body.piece(self.left).await;
        if piece.is_err() {
            self.body = None;
            self.next = None;
        }
        let piece = piece?;
        self.left -= piece.len() as u64;
        if self.left == 0 {
            self.hand_on();
        }
        Ok(Some(piece))
    }

    fn hand_on(&mut self) {
        if let (Some(mut body), Some(next)) = (self.body.take(), self.next.take()) {
            body.skip += self.left;
            // who comes next may not want it
            let _ = next.send(body);
        }
    }
}

impl Drop for PartReader {
    fn drop(&mut self) {
        // the body may be waiting for this one
        if let Some(mut body) = self.turn.take().and_then(|mut turn| turn.try_recv().ok()) {
            body.skip += self.skip;
            self.body = Some(body);
        }
        self.hand_on();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    /// A prelude with such parts, whose body comes in pieces.
    fn prelude(parts: &[(&str, u64)], pieces: &[&'static [u8]]) -> Prelude {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece))).collect();
        let named = |(kind, size): &(&str, u64)| Descriptor { size: *size, ..Descriptor::of(kind, b"") };
        let pieces = stream::iter(pieces).boxed();
        let body = Body { url: "url".to_owned(), pieces, rest: Bytes::new(), skip: 0 };
        Prelude { body, parts: parts.iter().map(named).collect() }
    }

    fn all(part: PartStream) -> Result<Vec<u8>, WireError> {
        let all = part.try_fold(Vec::new(), |mut all, piece| async move {
            all.extend_from_slice(&piece);
            Ok(all)
        });
        all.now_or_never().expect("all of it is there")
    }

    fn bytes(part: Option<(Descriptor, PartStream)>) -> Option<Vec<u8>> {
        Some(all(part?.1).expect("it comes"))
    }

    #[test]
    fn each_part_is_what_its_place_is_however_it_comes_and_others_are_passed_over() {
        let parts = [("x", 3), ("a", 4), ("y", 1), ("b", 2), ("a", 2)];
        for pieces in [&[&b"xxxaaaaybbAA"[..]][..], &[b"xx", b"xaa", b"", b"aa", b"y", b"bbA", b"A"]] {
            let [a, b] = prelude(&parts, pieces).split(["a", "b"]);
            assert_eq!(bytes(a).expect("a"), b"aaaa");
            assert_eq!(bytes(b).expect("b"), b"bb");
            // in its turn, and not read
            let [a, b] = prelude(&parts, pieces).split(["a", "b"]);
            drop(a);
            assert_eq!(bytes(b).expect("b"), b"bb");
            // and read in part
            let [a, b] = prelude(&parts, pieces).split(["a", "b"]);
            let mut a = a.expect("a").1;
            a.next().now_or_never().expect("it is there");
            drop(a);
            assert_eq!(bytes(b).expect("b"), b"bb");
            // behind what comes after it nothing is looked for
            let [b, a] = prelude(&parts[..4], pieces).split(["b", "a"]);
            assert!(a.is_none());
            assert_eq!(bytes(b).expect("b"), b"bb");
        }
        let [absent, none] = prelude(&[("a", 0)], &[]).split(["b", "a"]);
        assert!(absent.is_none());
        assert_eq!(bytes(none).expect("a"), b"");
    }

    #[test]
    fn a_part_waits_for_those_before_it() {
        let [a, b] = prelude(&[("a", 2), ("b", 1)], &[b"aab"]).split(["a", "b"]);
        let mut b = b.expect("b").1;
        assert!(b.next().now_or_never().is_none(), "it comes behind the other");
        assert_eq!(bytes(a).expect("a"), b"aa");
        assert_eq!(all(b).expect("its turn"), b"b");
    }

    #[test]
    fn a_prelude_that_breaks_off_is_an_error_that_may_pass_of_all_that_has_not_come() {
        let [a, b] = prelude(&[("a", 2), ("b", 4)], &[b"aab"]).split(["a", "b"]);
        assert_eq!(bytes(a).expect("a"), b"aa");
        assert!(all(b.expect("b").1).expect_err("it broke off").is_passing());
        let [a, b] = prelude(&[("a", 4), ("b", 4)], &[b"aa"]).split(["a", "b"]);
        assert!(all(a.expect("a").1).expect_err("it broke off").is_passing());
        assert!(all(b.expect("b").1).expect_err("it never begins").is_passing());
    }
}
