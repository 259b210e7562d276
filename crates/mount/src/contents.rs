//! What of a tree comes after its names: where the bytes of files are.

use tokio::sync::watch;

/// Whether a tree has its contents ([`lamina_image::Tree::has_contents`]), for who waits for them.
#[derive(Clone, Debug)]
pub struct Contents(watch::Receiver<bool>);

impl Contents {
    /// They are there.
    pub fn here() -> Self {
        Self(watch::channel(true).1)
    }

    /// They are there once `true` was sent.
    pub fn coming() -> (watch::Sender<bool>, Self) {
        let (sender, come) = watch::channel(false);
        (sender, Self(come))
    }

    /// Returns once they are there, or nobody brings them any more.
    pub async fn come(&self) {
        let _ = self.0.clone().wait_for(|come| *come).await;
    }
}
