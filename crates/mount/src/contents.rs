//! What of a tree comes after its names: where the bytes of files are.

use std::sync::Arc;

use tokio::sync::{Notify, watch};

/// Whether a tree has its contents ([`lamina_image::Tree::has_contents`]), for who waits for them.
#[derive(Clone, Debug)]
pub struct Contents {
    come: watch::Receiver<bool>,
    needed: Arc<Notify>,
}

/// What whoever brings the contents of a tree knows of those who wait.
#[derive(Debug)]
pub struct Bringing {
    come: watch::Sender<bool>,
    needed: Arc<Notify>,
}

impl Contents {
    /// They are there.
    pub fn here() -> Self {
        Self { come: watch::channel(true).1, needed: Arc::default() }
    }

    /// They are there once [`Bringing::done`] was called.
    pub fn coming() -> (Bringing, Self) {
        let (sender, come) = watch::channel(false);
        let needed = Arc::<Notify>::default();
        (Bringing { come: sender, needed: Arc::clone(&needed) }, Self { come, needed })
    }

    /// Returns once they are there, or nobody brings them any more. They may be late: other things go first.
    pub async fn come(&self) {
        let _ = self.come.clone().wait_for(|come| *come).await;
    }

    /// The same, and nothing goes first any more.
    pub async fn need(&self) {
        self.needed.notify_one();
        self.come().await;
    }
}

impl Bringing {
    /// Returns once somebody has said that he needs them.
    pub async fn needed(&self) {
        self.needed.notified().await;
    }

    /// The tree has them.
    pub fn done(self) {
        self.come.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_brings_contents_is_told_of_those_who_need_them_and_not_of_those_who_wait() {
        let (bringing, contents) = Contents::coming();
        let second = Duration::from_secs(1);
        timeout(second, contents.come()).await.expect_err("they have not come");
        timeout(second, bringing.needed()).await.expect_err("nobody needs them");
        // a reader who gives up has said so all the same
        timeout(second, contents.need()).await.expect_err("they have not come");
        timeout(second, bringing.needed()).await.expect("somebody needs them");
        bringing.done();
        timeout(second, contents.need()).await.expect("they are there");
    }

    #[tokio::test]
    async fn nobody_waits_for_what_nobody_brings_any_more() {
        let (bringing, contents) = Contents::coming();
        drop(bringing);
        contents.need().await;
        Contents::here().need().await;
    }
}
