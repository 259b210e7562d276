//! The machine that figures were taken on: without it they say nothing.

use std::process::Command;

use serde_json::{Value, json};

/// What matters for speed.
pub(crate) struct Machine {
    /// Model of the CPU.
    pub(crate) cpu: String,
    /// Cores that the bench may use.
    pub(crate) cores: usize,
    /// Memory in bytes.
    pub(crate) memory_bytes: u64,
    /// Release of the kernel.
    pub(crate) kernel: String,
    /// When the bench ended, in UTC as RFC 3339.
    pub(crate) date: String,
}

/// Left free by [`touch_free_memory`], in bytes.
const SPARE_BYTES: u64 = 2 << 30;
/// Taken at once by [`touch_free_memory`], in bytes.
const TOUCHED_AT_ONCE: usize = 64 << 20;

/// Writes to free memory once, to `max_bytes` of it, and gives it back. The host of a virtual machine may find a page only when it is
/// first touched, in some 10 µs, and takes back what was free for two seconds (free page reporting, `mm/page_reporting.c`): without this
/// whoever is measured next pays for that.
pub(crate) fn touch_free_memory(max_bytes: u64) {
    let free = memory("MemFree").saturating_sub(SPARE_BYTES);
    let blocks = free.min(max_bytes) / TOUCHED_AT_ONCE as u64;
    let touched: Vec<Vec<u8>> = (0..blocks).map(|_| vec![1; TOUCHED_AT_ONCE]).collect();
    drop(std::hint::black_box(touched));
}

/// A line of `/proc/meminfo` in bytes; 0 where there is none.
fn memory(name: &str) -> u64 {
    let kib: u64 = field("/proc/meminfo", name).trim_end_matches(" kB").parse().unwrap_or(0);
    kib << 10
}

fn field(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

impl Machine {
    /// This machine, now. What cannot be found out is empty.
    pub(crate) fn here() -> Self {
        let date = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output();
        Self {
            cpu: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory("MemTotal"),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            date: date
                .map(|date| String::from_utf8_lossy(&date.stdout).trim().to_owned())
                .unwrap_or_default(),
        }
    }

    /// One line for people.
    pub(crate) fn line(&self) -> String {
        let gib = self.memory_bytes.div_ceil(1 << 30);
        format!("{}, {} cores, {gib} GiB, Linux {}, {}", self.cpu, self.cores, self.kernel, self.date)
    }

    /// All of it, for a file.
    pub(crate) fn json(&self) -> Value {
        json!({
            "cpu": self.cpu,
            "cores": self.cores,
            "memory_bytes": self.memory_bytes,
            "kernel": self.kernel,
        })
    }
}
