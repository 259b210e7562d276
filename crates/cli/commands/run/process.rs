//! What of a command line and of an image's config becomes the program: as docker has it.

use std::ffi::OsString;

use anyhow::{Result, bail};
use lamina_image::Process;

/// The program and its arguments; empty if nobody says. A command takes the place of the image's and comes behind its
/// entrypoint; another entrypoint takes the place of both.
pub(super) fn command(image: &Process, entrypoint: Option<&str>, command: &[String]) -> Vec<String> {
    let mut words = match entrypoint {
        None => image.entrypoint.clone(),
        Some("") => Vec::new(),
        Some(program) => vec![program.to_owned()],
    };
    words.extend_from_slice(match (entrypoint, command) {
        (None, []) => &image.cmd,
        _ => command,
    });
    words
}

/// The variables of the image and then `added`, `NAME=VALUE` or `NAME`, whose value is what `here` gives, or which is left
/// out.
pub(super) fn environment(
    image: &[String],
    added: &[String],
    here: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<String>> {
    let mut all = image.to_vec();
    for one in added {
        match one.split_once('=') {
            Some(("", _)) => bail!("--env {one}: a variable must have a name"),
            Some(_) => all.push(one.clone()),
            None => match here(one).map(OsString::into_string) {
                Some(Ok(value)) => all.push(format!("{one}={value}")),
                Some(Err(_)) => bail!("--env {one}: its value must be UTF-8"),
                None => {}
            },
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn commands_are_put_together_as_docker_does_it() {
        let image = Process { entrypoint: words("/entry -x"), cmd: words("serve all"), ..Process::default() };
        let cases = [
            (None, "", "/entry -x serve all"),
            (None, "sh -c x", "/entry -x sh -c x"),
            (Some("env"), "", "env"),
            (Some("env"), "-i sh", "env -i sh"),
            (Some(""), "sh", "sh"),
            (Some(""), "", ""),
        ];
        for (entrypoint, given, expected) in cases {
            assert_eq!(command(&image, entrypoint, &words(given)), words(expected), "{entrypoint:?} {given}");
        }
        assert!(command(&Process::default(), None, &[]).is_empty());
    }

    #[test]
    fn variables_come_from_the_image_then_from_the_command_line_then_from_here() {
        let here = |name: &str| (name == "HERE").then(|| "h".into());
        let all = environment(&words("A=1 B=2"), &words("B=3 HERE NOWHERE C="), here).unwrap();
        assert_eq!(all, words("A=1 B=2 B=3 HERE=h C="));
        assert!(environment(&[], &words("=x"), here).is_err());
    }
}
