//! What a person sees while something long runs.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use lamina_image::Progress;

/// How often the bar is drawn again.
const TICK: Duration = Duration::from_millis(100);

/// A bar on stderr over so many bytes, where stderr is a terminal.
pub(crate) fn bytes(total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "{elapsed} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    ProgressBar::new(total).with_style(style)
}

/// Draws a bar on stderr until it is dropped, where stderr is a terminal.
pub(crate) struct Bar {
    bar: ProgressBar,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Bar {
    /// Watches a push that will read `total` bytes, where that is known.
    pub(crate) fn watch(progress: &Arc<Progress>, total: Option<u64>) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self { bar: ProgressBar::hidden(), task: None };
        }
        let bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
        let template = "{elapsed} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {msg}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is valid"));
        let (drawn, progress) = (bar.clone(), Arc::clone(progress));
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(TICK);
            loop {
                ticks.tick().await;
                drawn.set_position(progress.read.load(Relaxed));
                let (new, known) = (progress.new.load(Relaxed), progress.known.load(Relaxed));
                let sent = indicatif::BinaryBytes(progress.sent.load(Relaxed));
                drawn.set_message(format!("{new} new, {known} known, {sent} sent"));
            }
        });
        Self { bar, task: Some(task) }
    }

    /// Says what happens after everything is read.
    pub(crate) fn stage(&self, what: &str) {
        if self.task.is_some() {
            self.bar.println(what);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        self.bar.finish_and_clear();
    }
}
