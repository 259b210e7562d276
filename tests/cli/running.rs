//! `lamina run`: programs in images, and what is left of them.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::{Image, Layer};
use lamina_testkit::mounts::mounts;
use lamina_testkit::process::{Process, until};
use rustix::process::Signal;

use crate::rig::{DEADLINE, Rig, programs, real_image, text};

/// What the images here can run.
const PROGRAMS: [&str; 8] = [
    "/bin/sh",
    "/bin/cat",
    "/bin/ls",
    "/bin/touch",
    "/bin/true",
    "/usr/bin/id",
    "/usr/bin/env",
    "/bin/sleep",
];

/// An image whose config says everything that it can.
fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    push(&rig)?;
    Ok(rig)
}

fn push(rig: &Rig) -> Result<()> {
    let layer = programs(Layer::new(), &PROGRAMS)?;
    let image = Image::new()
        .layer(|_| layer)
        .layer(|layer| {
            let layer = layer.file("etc/passwd", "root:x:0:0::/root:\napp:x:1000:100::/srv/app:\n");
            let layer = layer.file("etc/group", "root:x:0:\nvideo:x:44:app\n").file("etc/keep", "kept\n");
            layer.file("data", "no program").fifo("fifo")
        })
        .entrypoint(["/bin/sh", "-c"])
        .command(["echo $GREETING $HOME; echo * > /dev/null; pwd; id -u; id -G"])
        .env("GREETING=hello")
        .user("app")
        .working_dir("/srv/made");
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")]).map(drop)
}

/// Runs a script in the image as root, with more options.
fn script(rig: &Rig, options: &[&str], script: &str) -> Result<Output> {
    let name = rig.name("a:t");
    let first: &[&str] = &["run", "--user", "0", "--entrypoint", ""];
    rig.lamina(&[first, options, &[&name, "--", "/bin/sh", "-c", script]].concat())
}

/// What a script printed, which must end with 0.
fn printed(rig: &Rig, options: &[&str], text: &str) -> Result<String> {
    let output = script(rig, options, text)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{text}: {}: {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// A script that runs, having said `ready`.
fn started(rig: &Rig, script: &str) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["run", "--user", "0", &rig.name("a:t"), "--", script]);
    command.env("LAMINA_CACHE", rig.path("cache"));
    let mut process = Process::spawn("run", &mut command)?;
    process.wait_line("ready", DEADLINE)?;
    Ok(process)
}

/// Processes of this machine, whose command line has a word with this in it.
fn processes(marker: &str) -> Result<usize> {
    let commands = fs::read_dir("/proc")?.flatten().map(|entry| fs::read(entry.path().join("cmdline")));
    let found = commands.flatten().filter(|words| String::from_utf8_lossy(words).contains(marker));
    Ok(found.count())
}

/// Whether something is mounted below the cache.
fn is_mounted(rig: &Rig) -> Result<bool> {
    Ok(mounts()?.iter().any(|mount| mount.dir.starts_with(rig.path("cache"))))
}

/// Scratch directories.
fn scratch(rig: &Rig) -> Result<usize> {
    Ok(fs::read_dir(rig.path("cache/run"))?.flatten().filter(|entry| entry.path().is_dir()).count())
}

/// No mount and no scratch directory.
fn nothing_is_left(rig: &Rig) -> Result<()> {
    ensure!(!is_mounted(rig)?, "a mount is left: {:?}", mounts()?);
    ensure!(scratch(rig)? == 0, "a scratch directory is left");
    Ok(())
}

#[test]
fn what_the_config_says_runs_as_who_and_where_it_says() -> Result<()> {
    let rig = pushed()?;
    let name = rig.name("a:t");
    ensure!(rig.ok(&["run", &name])? == "hello /srv/app\n/srv/made\n1000\n100 44\n");
    let words =
        ["run", "--env", "GREETING=bye", "--env", "HOME=/h", "--user", "7:8", "--workdir", "/tmp/w", &name];
    ensure!(rig.ok(&words)? == "bye /h\n/tmp/w\n7\n8\n");
    ensure!(
        rig.ok(&["run", &name, "--", "echo $0 $1", "a", "b"])? == "a b\n",
        "a command takes the place of Cmd"
    );
    let words = ["run", "--entrypoint", "/usr/bin/env", &name, "--", "-i", "A=1", "/usr/bin/env"];
    ensure!(rig.ok(&words)? == "A=1\n", "the entrypoint is another");
    nothing_is_left(&rig)
}

#[test]
fn what_is_written_is_seen_by_the_program_and_gone_with_it() -> Result<()> {
    let rig = pushed()?;
    let change = "echo new > /etc/new && cat /etc/new && echo changed > /etc/keep && cat /etc/keep";
    for options in [&[][..], &["--in-memory"]] {
        ensure!(printed(&rig, options, change)? == "new\nchanged\n");
        ensure!(printed(&rig, options, "cat /etc/keep; ls /etc/new || true")? == "kept\n");
    }
    let output = script(&rig, &["--read-only", "--workdir", "/"], "cat /etc/keep; touch /etc/new")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.stdout == b"kept\n" && said.contains("Read-only file system"), "{said}");
    ensure!(output.status.code() == Some(1), "{}", output.status);
    nothing_is_left(&rig)
}

#[test]
fn a_program_sees_its_own_processes_and_the_devices_and_names_of_the_machine() -> Result<()> {
    let rig = pushed()?;
    let seen = printed(
        &rig,
        &[],
        "echo x > /dev/null; ls -d /proc/[0-9]*; ls /sys/kernel > /dev/null; cat /etc/hosts",
    )?;
    let hosts = fs::read_to_string("/etc/hosts")?;
    let (listed, rest) = seen.split_at(seen.len().checked_sub(hosts.len()).context(seen.clone())?);
    ensure!(rest == hosts, "{seen}");
    // its init, and the shell, which spells the names out itself
    ensure!(listed.lines().count() == 2 && listed.starts_with("/proc/1\n"), "{listed}");
    for file in ["/sys/kernel/mm/ksm/run", "/etc/hosts", "/etc/resolv.conf"] {
        let refused = script(&rig, &[], &format!("echo >> {file}"))?;
        ensure!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"), "{refused:?}");
    }
    Ok(())
}

#[test]
fn volumes_are_seen_and_written_unless_they_are_read_only() -> Result<()> {
    let rig = pushed()?;
    let directory = rig.path("scratch");
    fs::write(directory.join("in"), "from outside\n")?;
    let file = directory.join("in");
    let volumes = [
        format!("{}:/new/place", text(&directory)),
        format!("{}:/looked/at:ro", text(&directory)),
        format!("{}:/etc/keep", text(&file)),
    ];
    let options: Vec<&str> = volumes.iter().flat_map(|volume| ["--volume", volume]).collect();
    let seen = printed(&rig, &options, "cat /etc/keep /looked/at/in; echo out > /new/place/out")?;
    ensure!(seen == "from outside\nfrom outside\n", "{seen}");
    ensure!(fs::read_to_string(directory.join("out"))? == "out\n");
    let output = script(&rig, &options, "echo out > /looked/at/out")?;
    ensure!(String::from_utf8_lossy(&output.stderr).contains("Read-only file system"), "{output:?}");
    ensure!(directory.join("in").exists(), "removing a scratch directory leaves volumes alone");
    let output = script(&rig, &["--volume", "/no/where:/x"], "true")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(125) && said.contains("/no/where"), "{said}");
    for volume in ["/x", "/x:y", "/x:/y:z", "/x:/../y", ":/y", "/x:/", "/x:/./"] {
        ensure!(script(&rig, &["--volume", volume], "true")?.status.code() == Some(2), "{volume}");
    }
    nothing_is_left(&rig)
}

#[test]
fn a_volume_in_another_is_seen_in_whatever_order_they_are_given() -> Result<()> {
    let rig = pushed()?;
    let (outer, inner) = (rig.path("scratch"), rig.path("tmp"));
    fs::create_dir(outer.join("in"))?;
    fs::write(outer.join("a"), "outer\n")?;
    fs::write(inner.join("b"), "inner\n")?;
    let volumes = [format!("{}:/v/in", text(&inner)), format!("{}:/v", text(&outer))];
    for volumes in [[&volumes[0], &volumes[1]], [&volumes[1], &volumes[0]]] {
        let options = ["--volume", volumes[0], "--volume", volumes[1]];
        ensure!(printed(&rig, &options, "cat /v/a /v/in/b")? == "outer\ninner\n");
    }
    Ok(())
}

#[test]
fn shared_memory_is_the_program_s_own_and_gone_with_it() -> Result<()> {
    let rig = pushed()?;
    let file = format!("/dev/shm/lamina-{}", std::process::id());
    for options in [&[][..], &["--in-memory"]] {
        ensure!(printed(&rig, options, &format!("echo x > {file}; cat /dev/shm/*"))? == "x\n", "{options:?}");
        ensure!(!Path::new(&file).exists(), "it is the machine's");
    }
    Ok(())
}

#[test]
fn a_program_that_is_not_root_opens_the_pipes_that_are_its_streams() -> Result<()> {
    let rig = pushed()?;
    let output = rig.lamina(&["run", &rig.name("a:t"), "--", "id -u > /dev/stdout; echo e > /dev/stderr"])?;
    ensure!(output.status.success() && output.stdout == b"1000\n" && output.stderr == b"e\n", "{output:?}");
    Ok(())
}

#[test]
fn nobody_waits_for_an_image_whose_users_are_in_a_fifo() -> Result<()> {
    let rig = Rig::new()?;
    let layer = programs(Layer::new(), &PROGRAMS)?;
    let image = Image::new().layer(|_| layer).layer(|layer| layer.fifo("etc/passwd").fifo("etc/group"));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let output = rig.lamina(&["run", "--user", "app", &rig.name("a:t"), "--", "/bin/true"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(125) && said.contains("no user app"), "{said}");
    ensure!(rig.ok(&["run", "--user", "7", &rig.name("a:t"), "--", "/usr/bin/id", "-u"])? == "7\n");
    Ok(())
}

#[test]
fn an_init_without_whoever_started_it_says_so() -> Result<()> {
    let rig = Rig::new()?;
    for (words, code) in [(&["inside", "--", "-1"][..], 2), (&["inside", "2"], 2), (&["inside", "999"], 125)]
    {
        let output = rig.lamina(words)?;
        ensure!(output.status.code() == Some(code), "{words:?}: {output:?}");
        ensure!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    }
    Ok(())
}

#[test]
fn a_link_in_an_image_leads_nowhere_outside_of_it() -> Result<()> {
    let rig = Rig::new()?;
    let layer = programs(Layer::new(), &PROGRAMS)?;
    let outside = text(&rig.path("scratch"));
    let image = Image::new().layer(|_| layer).layer(|layer| {
        let layer = layer.symlink("etc/hosts", format!("{outside}/made")).symlink("sys", &outside);
        layer.symlink("out", "../../../inside").dir("inside").symlink("proc", "nowhere")
    });
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let volume = format!("{}:/out/volume", text(&rig.path("tmp")));
    let seen = printed(
        &rig,
        &["--volume", &volume],
        "cat /etc/hosts; ls -d /out/volume; cat /proc/1/comm > /dev/null",
    )?;
    ensure!(seen == fs::read_to_string("/etc/hosts")? + "/out/volume\n", "{seen}");
    ensure!(fs::read_dir(&outside)?.next().is_none(), "something was made outside of the image");
    Ok(())
}

#[test]
fn a_link_to_what_is_of_the_machine_has_nothing_made_there() -> Result<()> {
    let rig = Rig::new()?;
    let outside = text(&rig.path("scratch"));
    let devices = || -> Result<Vec<_>> {
        let mut names: Vec<_> = fs::read_dir("/dev")?.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        Ok(names)
    };
    let before = devices()?;
    for (tag, target) in [("dev", "/dev"), ("fd", "/proc/self/fd/9")] {
        let layer = programs(Layer::new(), &PROGRAMS)?;
        let image = Image::new().layer(|_| layer).layer(|layer| layer.dir("dev").symlink("etc", target));
        let source = rig.layout(tag, &image)?;
        let name = rig.name(&format!("{tag}:t"));
        rig.ok(&["push", &source, &name])?;
        let output = with_directory_open(&rig, &outside, &[&name, "--", "/bin/true"])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(125) && said.contains("/etc/"), "{target}: {said}");
        let working = ["--workdir", "/dev/lamina-made", &name, "--", "/bin/true"];
        ensure!(with_directory_open(&rig, &outside, &working)?.status.code() == Some(125));
        ensure!(fs::read_dir(&outside)?.next().is_none(), "something was made outside of the image");
        ensure!(devices()? == before, "something was made in /dev");
    }
    nothing_is_left(&rig)
}

#[test]
fn nothing_is_made_in_the_machine_s_devices_and_volumes_are_the_user_s() -> Result<()> {
    let rig = pushed()?;
    let output = script(&rig, &["--workdir", "/dev/lamina-made"], "true")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(125) && said.contains("no part of the image"), "{said}");
    ensure!(!Path::new("/dev/lamina-made").exists());
    let volume = format!("{}:/work", text(&rig.path("scratch")));
    ensure!(printed(&rig, &["--volume", &volume, "--workdir", "/work/made"], "pwd")? == "/work/made\n");
    Ok(())
}

#[test]
fn what_whoever_starts_a_run_has_open_is_closed_in_the_program() -> Result<()> {
    let rig = pushed()?;
    let outside = text(&rig.path("scratch"));
    let run = ["--user", "0", &rig.name("a:t"), "--", "ls /proc/$$/fd; true"];
    let output = with_directory_open(&rig, &outside, &run)?;
    ensure!(output.stdout == b"0\n1\n2\n", "{output:?}");
    let run = ["--workdir", "/proc/self/fd/9", &rig.name("a:t"), "--", "true"];
    ensure!(with_directory_open(&rig, &outside, &run)?.status.code() == Some(125));
    Ok(())
}

/// Runs `lamina run` from a shell that has a directory open, as descriptor 9.
fn with_directory_open(rig: &Rig, directory: &str, words: &[&str]) -> Result<Output> {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec 9<\"$1\"; shift; exec \"$@\"", "sh", directory]);
    command.args([env!("CARGO_BIN_EXE_lamina"), "run"]).args(words).env("LAMINA_CACHE", rig.path("cache"));
    Ok(command.output()?)
}

#[test]
fn exit_codes_are_the_program_s_or_docker_s() -> Result<()> {
    let rig = pushed()?;
    let name = rig.name("a:t");
    ensure!(script(&rig, &[], "exit 7")?.status.code() == Some(7));
    ensure!(script(&rig, &[], "kill -TERM $$")?.status.code() == Some(143));
    ensure!(script(&rig, &[], "kill -KILL $$")?.status.code() == Some(137));
    let nowhere = rig.name("none:t");
    let cases: [(&[&str], i32, &str); 5] = [
        (&["run", "--entrypoint", "no-such-program", &name], 127, "no-such-program cannot be started"),
        (&["run", "--entrypoint", "/data", &name], 126, "/data cannot be started"),
        (&["run", "--user", "nobody", &name], 125, "the image has no user nobody"),
        (&["run", "--entrypoint", "", &name], 125, "does not say what to run"),
        (&["run", &nowhere], 125, "not found"),
    ];
    for (words, code, expected) in cases {
        let output = rig.lamina(words)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(code), "{words:?}: {}: {said}", output.status);
        ensure!(
            said.starts_with("lamina: ") && said.contains(expected) && said.lines().count() == 1,
            "{said}"
        );
        ensure!(output.stdout.is_empty());
    }
    nothing_is_left(&rig)
}

#[test]
fn what_ran_here_before_runs_again_while_its_registry_is_away() -> Result<()> {
    let mut rig = pushed()?;
    let name = rig.name("a:t");
    ensure!(rig.ok(&["run", &name, "--", "cat /etc/keep"])? == "kept\n");
    rig.registry = None;
    let output = rig.lamina(&["run", &name, "--", "cat /etc/keep"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && output.stdout == b"kept\n", "{}: {said}", output.status);
    ensure!(
        said.contains("nobody says what") && said.contains("mounted what it was when last asked"),
        "{said}"
    );
    let output = rig.lamina(&["run", &rig.name("b:t"), "--", "cat /etc/keep"])?;
    ensure!(output.status.code() == Some(125), "{}", output.status);
    nothing_is_left(&rig)
}

#[test]
fn an_image_runs_from_a_mirror_though_nobody_ever_reached_its_registry() -> Result<()> {
    let rig = pushed()?;
    // nothing listens on the first port
    let mirror = format!("127.0.0.1:1=http://{}", rig.address);
    let output = rig.ok(&["run", "--mirror", &mirror, "127.0.0.1:1/a:t"])?;
    ensure!(output.starts_with("hello /srv/app"), "{output}");
    nothing_is_left(&rig)
}

#[test]
fn what_is_mounted_is_what_runs_though_the_tag_was_moved_since_it_last_ran() -> Result<()> {
    let mut rig = pushed()?;
    let name = rig.name("a:t");
    ensure!(rig.ok(&["run", &name])?.starts_with("hello"));
    let layer = programs(Layer::new(), &PROGRAMS)?;
    let moved = Image::new().layer(|_| layer.file("moved", "moved\n")).command(["/bin/cat", "/moved"]);
    let source = rig.layout("moved", &moved)?;
    rig.ok(&["push", &source, &name])?;
    let manifest = rig.json(&["mount", &name, &text(&rig.path("mount"))])?["manifest"].clone();
    let pinned = rig.name(&format!("a@{}", manifest.as_str().context("a digest")?));
    let registry = rig.registry.take();
    let address = rig.address.clone();
    drop(registry);
    let output = rig.lamina(&["run", &name])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(125) && said.contains("is to be run"), "{said}");
    rig.start_registry_on(&address)?;
    ensure!(rig.ok(&["run", &pinned])? == "moved\n");
    rig.registry = None;
    let output = rig.lamina(&["run", &name])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && output.stdout == b"moved\n", "{}: {said}", output.status);
    Ok(())
}

#[test]
fn standard_input_is_the_program_s() -> Result<()> {
    let rig = pushed()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["run", &rig.name("a:t"), "--", "cat; echo end"]).env("LAMINA_CACHE", rig.path("cache"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("it is piped")?.write_all(b"through\n")?;
    ensure!(child.wait_with_output()?.stdout == b"through\nend\n");
    Ok(())
}

#[test]
fn a_shell_has_the_terminal_to_itself() -> Result<()> {
    let rig = pushed()?;
    let lamina = env!("CARGO_BIN_EXE_lamina");
    let command = format!("{lamina} run --user 0 --entrypoint /bin/sh {}; echo then $?", rig.name("a:t"));
    // script(1) makes a terminal of what it reads and writes
    let mut script = Command::new("script");
    script
        .args(["-qec", &format!("/bin/sh -c '{command}'"), "/dev/null"])
        .env("LAMINA_CACHE", rig.path("cache"));
    let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("it is piped")?.write_all(b"kill -TSTP $$; echo a$((1+1))b\nexit 5\n")?;
    let said = String::from_utf8_lossy(&child.wait_with_output()?.stdout).into_owned();
    ensure!(said.contains("a2b") && said.contains("then 5"), "{said}");
    ensure!(!said.contains("tty") && !said.contains("job control"), "{said}");
    nothing_is_left(&rig)
}

#[test]
fn signals_reach_the_program_and_nothing_is_left_when_it_ends() -> Result<()> {
    let rig = pushed()?;
    for signal in [Signal::TERM, Signal::INT] {
        // nobody ever writes to that pipe
        let mut process = started(&rig, "echo ready; exec cat /fifo")?;
        process.signal(signal)?;
        ensure!(process.wait(DEADLINE)?.code() == Some(128 + signal.as_raw()));
        nothing_is_left(&rig)?;
    }
    let mut process = started(&rig, "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done")?;
    process.signal(Signal::TERM)?;
    ensure!(process.wait(DEADLINE)?.code() == Some(3), "the program decides");
    nothing_is_left(&rig)
}

#[test]
fn whatever_a_program_leaves_behind_ends_with_it() -> Result<()> {
    let rig = pushed()?;
    let marker = format!("100000.{}", std::process::id());
    ensure!(printed(&rig, &[], &format!("sleep {marker} & echo left"))? == "left\n");
    ensure!(processes(&marker)? == 0, "a process is left");
    nothing_is_left(&rig)
}

#[test]
fn of_a_run_that_is_killed_neither_process_nor_mount_is_left_and_its_scratch_goes_with_the_next() -> Result<()>
{
    let rig = pushed()?;
    let marker = format!("200000.{}", std::process::id());
    let mut process = started(&rig, &format!("echo ready; touch /written; sleep {marker}; true"))?;
    ensure!(is_mounted(&rig)? && scratch(&rig)? == 1);
    process.signal(Signal::KILL)?;
    process.wait(DEADLINE)?;
    until("the program to die", DEADLINE, || Ok((processes(&marker)? == 0).then_some(())))?;
    until("its mount to go", DEADLINE, || Ok((!is_mounted(&rig)?).then_some(())))?;
    ensure!(scratch(&rig)? == 1, "somebody has tidied up already");
    ensure!(printed(&rig, &[], "echo next")? == "next\n");
    nothing_is_left(&rig)
}

#[test]
fn a_mount_that_nobody_serves_any_more_goes_with_the_next_run() -> Result<()> {
    let rig = pushed()?;
    let mut process = started(&rig, "echo ready; exec cat /fifo")?;
    // all at once, as when a machine's memory is full: the daemon and its holder, each of which starts the other again, and the run
    let nodes = nodes(&text(&rig.path("cache")))?;
    ensure!(nodes.len() == 2, "a daemon and its holder: {nodes:?}");
    let group = rustix::process::getpgid(nodes.first().copied())?;
    ensure!(
        nodes.iter().all(|node| rustix::process::getpgid(Some(*node)) == Ok(group)),
        "a group of their own"
    );
    ensure!(group != rustix::process::getpgrp(), "a group of their own");
    rustix::process::kill_process_group(group, Signal::KILL)?;
    process.signal(Signal::KILL)?;
    process.wait(DEADLINE)?;
    // until then their socket may still take a connection
    for node in nodes {
        until("it to die", DEADLINE, || {
            let state = fs::read_to_string(format!("/proc/{node}/stat")).unwrap_or_default();
            Ok((state.is_empty() || state.contains(") Z ")).then_some(()))
        })?;
    }
    ensure!(printed(&rig, &[], "echo next")? == "next\n");
    nothing_is_left(&rig)
}

/// The daemon of a cache and its holder.
fn nodes(cache: &str) -> Result<Vec<rustix::process::Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        if words.contains("\0node\0") && words.contains(cache) {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            found.push(pid.and_then(rustix::process::Pid::from_raw).context("a process id")?);
        }
    }
    Ok(found)
}

/// Two programs in one image at the same time: each sees what it wrote, and none what the other did.
fn two_at_once(rig: &Rig) -> Result<()> {
    let script = "echo $$ > /mine; echo ready; read word < /fifo; cat /mine";
    let (mut first, mut second) = (started(rig, script)?, started(rig, &format!(": second; {script}"))?);
    let mounted = rig.json(&["stats"])?["mounts"].as_array().context("mounts")?.len();
    ensure!(mounted == 2, "{mounted} mounts");
    for process in [&mut first, &mut second] {
        process.signal(Signal::TERM)?;
        ensure!(process.wait(DEADLINE)?.code() == Some(143));
    }
    ensure!(printed(rig, &[], "ls /mine 2> /dev/null || echo none")? == "none\n");
    nothing_is_left(rig)
}

#[test]
fn two_runs_of_one_image_do_not_disturb_each_other_and_their_daemon_ends_after_them() -> Result<()> {
    let rig = pushed()?;
    two_at_once(&rig)?;
    rig.node_ended()
}

#[test]
fn a_node_that_runs_serves_runs_and_stays() -> Result<()> {
    let rig = pushed()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    let mut node = Process::spawn("node", command.args(["node", "--cache"]).arg(rig.path("cache")))?;
    node.wait_line("ready", DEADLINE)?;
    two_at_once(&rig)?;
    ensure!(rig.json(&["stats"])?["mounts"].as_array().is_some_and(Vec::is_empty));
    ensure!(node.stop(DEADLINE)?.success());
    Ok(())
}

#[test]
fn a_start_is_remembered_under_the_key_of_what_ran() -> Result<()> {
    let rig = pushed()?;
    rig.ok(&["run", "--command", "reader", &rig.name("a:t"), "--", "cat /data"])?;
    until("a profile of the command", DEADLINE, || {
        let shown = rig.json(&["profile", "show", &rig.name("a:t"), "--command", "reader"])?;
        Ok((!shown["profile"].is_null()).then_some(()))
    })
}

#[test]
fn python_computes_in_an_image_that_has_not_arrived() -> Result<()> {
    let rig = Rig::new()?;
    let name = rig.name("numpy:t");
    rig.ok(&["push", &real_image()?, &name])?;
    let program = "import numpy, os; print(int(numpy.arange(1000).sum()), os.path.exists('/dev/null'))";
    let printed = rig.ok(&["run", &name, "--", "python3", "-c", program])?;
    ensure!(printed == "499500 True\n", "{printed}");
    ensure!(Path::new("/dev/null").exists());
    nothing_is_left(&rig)
}

#[test]
fn a_program_runs_on_libraries_that_the_kernel_reads_by_itself() -> Result<()> {
    let rig = Rig::in_memory()?;
    push(&rig)?;
    // a mount that keeps the node, which counts
    rig.mount("a:t")?;
    until("a library as a whole", DEADLINE, || {
        ensure!(printed(&rig, &["--passthrough"], "id -u")? == "0\n");
        Ok((rig.counter("whole_files")? > 0).then_some(()))
    })?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    let script = "echo ready; cat /etc/keep; exec cat /fifo";
    command.args(["run", "--passthrough", "--user", "0", &rig.name("a:t"), "--", script]);
    command.env("LAMINA_CACHE", rig.path("cache"));
    // a program may be faster than the thread that finds out what its libraries are called
    until("a library to be read past the node", DEADLINE, || {
        let mut process = Process::spawn("run", &mut command)?;
        process.wait_line("kept", DEADLINE)?;
        let stats = rig.json(&["stats"])?;
        let mounts = stats["mounts"].as_array().context("mounts")?;
        let opens = mounts.iter().filter_map(|mount| mount["counters"]["passthrough_opens"].as_u64());
        let opens = opens.sum::<u64>();
        process.signal(Signal::TERM)?;
        process.wait(DEADLINE)?;
        Ok((opens > 0).then_some(()))
    })?;
    rig.unmount()
}
