//! What a node is told that makes no sense: a clear line, and nothing lost.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use anyhow::{Result, bail, ensure};
use lamina_node::Controller;
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounts;
use lamina_testkit::noise;
use lamina_testkit::process::until;
use lamina_wire::proto::MountRequest;

use crate::node::daemon;
use crate::rig::{DEADLINE, Rig, text};

fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("a", "a")))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    Ok(rig)
}

#[test]
fn garbage_on_the_control_socket_harms_nobody_and_only_root_may_send_it() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    let (socket, before) = (rig.path("cache/node.sock"), daemon(&rig)?);
    ensure!(fs::metadata(&socket)?.permissions().mode() & 0o777 == 0o600);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut frame = preface.to_vec();
    // a SETTINGS frame that says it is 16 MiB long
    frame.extend_from_slice(&[0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0]);
    let old = b"POST /lamina/v1/stats HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\n\r\n";
    let garbage: [&[u8]; 5] = [b"", &noise(100_000, 7), &preface[..9], &frame, old];
    // all at once, and none says goodbye
    let mut streams = Vec::new();
    for bytes in garbage {
        let mut stream = UnixStream::connect(&socket)?;
        // one that it has enough of it closes
        let _ = stream.write_all(bytes);
        streams.push(stream);
    }
    ensure!(daemon(&rig)? == before, "the daemon has died of it");
    ensure!(fs::read(mounted.join("a"))? == b"a");
    let mut answer = Vec::new();
    let _ = streams.remove(1).read_to_end(&mut answer);
    ensure!(!answer.windows(8).any(|text| text == b"HTTP/1.1"), "noise was answered as a request");
    drop(streams);
    rig.unmount()
}

#[test]
fn what_the_kernel_is_to_read_by_itself_is_not_recorded_as_well() -> Result<()> {
    let rig = pushed()?;
    rig.mount("a:t")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let request = MountRequest {
        reference: rig.name("a:t"),
        directory: text(&rig.path("scratch")),
        record: true,
        passthrough: true,
        ..MountRequest::default()
    };
    let controller = Controller::new(&rig.path("cache"));
    let Err(error) = runtime.block_on(controller.mount(&request)) else { bail!("both at once") };
    ensure!(error.to_string().contains("cannot be recorded"), "{error}");
    ensure!(
        fs::read_dir(rig.path("scratch"))?.next().is_none() && rig.json(&["stats"])?["mounts"][1].is_null()
    );
    rig.unmount()
}

#[test]
fn a_daemon_whose_directory_was_moved_away_leaves_the_socket_of_the_next_one_alone() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    let before = daemon(&rig)?;
    fs::rename(rig.path("cache"), rig.path("moved"))?;
    rig.ok(&["mount", &rig.name("a:t"), &text(&rig.path("scratch"))])?;
    let after = daemon(&rig)?;
    ensure!(after != before, "nothing was moved");
    // the only mount of the first goes, and with it the first
    rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::empty())?;
    until("the first daemon to end", DEADLINE, || {
        Ok(rustix::process::test_kill_process(before).is_err().then_some(()))
    })?;
    ensure!(daemon(&rig)? == after, "nobody finds the second daemon any more");
    ensure!(fs::read(rig.path("scratch/a"))? == b"a");
    Ok(())
}

#[test]
fn of_two_who_mount_on_one_directory_at_once_one_gets_it() -> Result<()> {
    let rig = pushed()?;
    for _ in 0..3 {
        let point = text(&rig.path("mount"));
        let mut all = Vec::new();
        for _ in 0..4 {
            let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
            command.args(["mount", &rig.name("a:t"), &point]).env("LAMINA_CACHE", rig.path("cache"));
            all.push(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?);
        }
        let mut got = 0;
        for child in all {
            let output = child.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            got += usize::from(output.status.success());
            ensure!(output.status.success() || said.contains("mounted at"), "{said}");
        }
        let below = mounts()?.into_iter().filter(|mount| mount.dir == rig.path("mount")).count();
        ensure!(got == 1 && below == 1, "{got} got it, and {below} are mounted there");
        rig.unmount()?;
    }
    Ok(())
}

#[test]
fn a_second_node_of_a_cache_is_refused_and_says_who_has_it() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    let pid = daemon(&rig)?.to_string();
    let said = rig.fails(&["node", "--cache", &text(&rig.path("cache"))])?;
    ensure!(said.contains(&pid) && said.contains("in use"), "{said}");
    ensure!(fs::read(mounted.join("a"))? == b"a");
    let config = rig.path("config.toml");
    fs::write(&config, "chache = \"/x\"\n")?;
    let said = rig.fails(&["--config", &text(&config), "node"])?;
    ensure!(said.contains("\"chache\"") && said.contains(&text(&config)), "{said}");
    ensure!(!Command::new(env!("CARGO_BIN_EXE_lamina")).args(["node", "what"]).output()?.status.success());
    rig.unmount()
}
