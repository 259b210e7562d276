//! What a node shows of itself.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::Process;
use rustix::process::Signal;

use crate::rig::{DEADLINE, Rig};

fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("big", noise(3_000_000, 5)));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    Ok(rig)
}

/// The body of `GET /metrics`.
fn scrape(url: &str) -> Result<String> {
    let (host, path) = url.trim_start_matches("http://").split_once('/').context("a URL")?;
    let mut stream = TcpStream::connect(host)?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("openmetrics-text"), "{answer}");
    Ok(answer.split_once("\r\n\r\n").context("a body")?.1.to_owned())
}

/// The value of one series.
fn value(text: &str, series: &str) -> Result<f64> {
    let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    let line = line.with_context(|| format!("no {series} in\n{text}"))?;
    Ok(line.rsplit(' ').next().context("a value")?.parse()?)
}

#[test]
fn prometheus_sees_what_was_read_from_where_and_how_long_it_took() -> Result<()> {
    let rig = pushed()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["node", "--metrics", "127.0.0.1:0", "--cache"]).arg(rig.path("cache"));
    let mut node = Process::spawn("node", &mut command)?;
    let url = node.wait_line("metrics on ", DEADLINE)?;
    let url = url.trim_start_matches("metrics on ");
    node.wait_line("ready", DEADLINE)?;
    let mounted = rig.mount_plain("a:t")?;
    ensure!(std::fs::read(mounted.join("big"))? == noise(3_000_000, 5));
    let seen = scrape(url)?;
    ensure!(seen.ends_with("# EOF\n"));
    ensure!(value(&seen, "lamina_cache_source_bytes_total")? >= 3e6);
    ensure!(value(&seen, "lamina_cache_wait_seconds_total")? > 0.0);
    ensure!(value(&seen, "lamina_mounts")? == 1.0 && value(&seen, "lamina_cache_waiting")? == 0.0);
    ensure!(value(&seen, "lamina_mount_read_bytes_total")? >= 3e6);
    let (source, host) = (format!("{{source=\"http://{0}\"}}", rig.address), &rig.address);
    ensure!(value(&seen, &format!("lamina_source_up{source}"))? == 1.0);
    ensure!(value(&seen, &format!("lamina_source_received_bytes_total{source}"))? >= 3e6);
    let fetches = format!("lamina_fetch_seconds_count{{class=\"demand\",source=\"{host}\"}}");
    ensure!(value(&seen, &fetches)? >= 1.0);
    rig.unmount()?;
    node.signal(Signal::TERM)?;
    ensure!(node.wait(DEADLINE)?.success());
    Ok(())
}

#[test]
fn stats_are_drawn_again_and_again_until_ctrl_c() -> Result<()> {
    let rig = pushed()?;
    rig.mount_plain("a:t")?;
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_lamina"), "stats", "--watch", "--cache"]);
    command.arg(rig.path("cache"));
    let mut watch = Process::spawn("watch", &mut command)?;
    watch.wait_line("cache    ", DEADLINE)?;
    watch.wait_line("source   ", DEADLINE)?;
    watch.wait_line("mount    ", DEADLINE)?;
    watch.wait_line("cache    ", DEADLINE)?;
    watch.signal(Signal::INT)?;
    ensure!(watch.wait(DEADLINE)?.success());
    rig.unmount()
}

#[test]
fn doctor_says_what_works_and_what_to_do() -> Result<()> {
    let rig = pushed()?;
    let lines = |arguments: &[&str]| -> Result<(bool, serde_json::Value)> {
        let output = rig.lamina(&[&["doctor", "--json"], arguments].concat())?;
        Ok((output.status.success(), serde_json::from_slice(&output.stdout)?))
    };
    let find = |report: &serde_json::Value, name: &str| -> Option<(String, String)> {
        let all = report["checks"].as_array()?;
        let one = all.iter().find(|one| one["check"] == name)?;
        Some((one["verdict"].as_str()?.to_owned(), one["advice"].as_str().unwrap_or_default().to_owned()))
    };
    let (well, report) = lines(&[&rig.name("a:t")])?;
    ensure!(well, "{report}");
    let names = [
        "kernel",
        "/dev/fuse",
        "privileges",
        "lamina run",
        "cache",
        "disk",
        "registry",
        "clock",
        "credentials",
    ];
    for name in names {
        let (verdict, _) = find(&report, name).with_context(|| format!("no line for {name}: {report}"))?;
        ensure!(verdict == "ok" || (verdict == "poor" && name == "kernel"), "{name}: {report}");
    }
    let (well, report) = lines(&["127.0.0.1:1", "--cache-mib", "1000000000"])?;
    let registry = find(&report, "registry").context("a line")?;
    ensure!(!well && registry.0 == "bad" && !registry.1.is_empty(), "{report}");
    let space = find(&report, "space").context("a line")?;
    ensure!(space.0 == "poor" && space.1.contains("--cache-mib"), "{report}");
    // a cache that is none of ours
    std::fs::write(rig.path("cache/version"), "lamina cache 9\n")?;
    let (well, report) = lines(&[])?;
    ensure!(!well && find(&report, "cache").context("a line")?.0 == "bad", "{report}");
    let said = rig.lamina(&["doctor"])?;
    ensure!(String::from_utf8_lossy(&said.stdout).contains("→ "), "{said:?}");
    Ok(())
}

/// A command for which the kernel does not know a system call.
#[expect(unsafe_code, reason = "there is no safe call for filters of system calls")]
fn without(command: &mut Command, call: libc::c_long) -> &mut Command {
    let number = u32::try_from(call).expect("a small number");
    let step =
        |code: u32, jt, jf, k| libc::sock_filter { code: u16::try_from(code).expect("16 bits"), jt, jf, k };
    let refused = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let mut filter = [
        // the number of the call comes first in what a filter sees
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, refused),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
        // SAFETY: the filter and what points to it outlive the calls
        let installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
        };
        if installed { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: two system calls, and nothing is allocated
    unsafe { command.pre_exec(install) }
}

#[test]
fn doctor_finds_a_system_call_that_is_missing() -> Result<()> {
    let rig = Rig::new()?;
    for (call, name) in [
        (libc::SYS_open_tree, "open_tree"),
        (libc::SYS_move_mount, "move_mount"),
        (libc::SYS_mount_setattr, "mount_setattr"),
        (libc::SYS_pidfd_open, "pidfd_open"),
        (libc::SYS_close_range, "close_range"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["doctor", "--json", "--cache"]).arg(rig.path("cache"));
        let report = without(&mut command, call).output()?.stdout;
        let report: serde_json::Value = serde_json::from_slice(&report)?;
        let checks = report["checks"].as_array().context("checks")?;
        let line = checks.iter().find(|one| one["check"] == "lamina run").context("a line")?;
        let said = line["found"].as_str().unwrap_or_default();
        ensure!(line["verdict"] == "poor" && said == format!("cannot call {name}"), "{name}: {report}");
        ensure!(line["advice"].as_str().is_some_and(|advice| advice.contains("5.12")), "{report}");
    }
    Ok(())
}
