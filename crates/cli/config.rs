//! Flags first, then `LAMINA_*`, then a TOML file, then defaults. The same names everywhere.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, FromArgMatches};

use crate::args::Arguments;

/// Read where no other file is named, if it exists.
const DEFAULT_FILE: &str = "/etc/lamina/config.toml";

/// The table that only a registry reads.
const ACCESS: &str = "access";

/// The table `[access]` of the configuration file, and that file, where there is one.
pub(crate) fn access_table(named: Option<&Path>) -> Result<Option<(PathBuf, toml::Table)>> {
    let default = Some(Path::new(DEFAULT_FILE)).filter(|path| path.exists());
    let Some(path) = named.or(default) else { return Ok(None) };
    let name = || path.display().to_string();
    let mut table: toml::Table =
        std::fs::read_to_string(path).with_context(name)?.parse().with_context(name)?;
    Ok(match table.remove(ACCESS) {
        Some(toml::Value::Table(access)) => Some((path.to_owned(), access)),
        _ => None,
    })
}

/// Parses the command line. Help, version and usage errors are printed here and end the process.
pub(crate) fn parse() -> Result<Arguments> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let command = match file(&words) {
        Some((path, named)) => with_file(Arguments::command(), &path, named)?,
        None => Arguments::command(),
    };
    let matches = command.get_matches_from(words);
    Ok(Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
}

/// The file, and whether somebody asked for it.
fn file(words: &[OsString]) -> Option<(PathBuf, bool)> {
    // what comes behind `--` is for others
    let mut words = words.iter().take_while(|word| *word != "--").map(|word| word.to_string_lossy());
    let mut named = None;
    while let Some(word) = words.next() {
        if word == "--config" {
            named = words.next().map(|path| PathBuf::from(&*path));
        } else if let Some(path) = word.strip_prefix("--config=") {
            named = Some(PathBuf::from(path));
        }
    }
    let named = named.or_else(|| std::env::var_os("LAMINA_CONFIG").map(PathBuf::from));
    match named {
        Some(path) => Some((path, true)),
        None => Some((PathBuf::from(DEFAULT_FILE), false)).filter(|(path, _)| path.exists()),
    }
}

/// Makes what the file says the defaults of the options with these names.
fn with_file(command: clap::Command, path: &Path, named: bool) -> Result<clap::Command> {
    let name = path.display();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if !named && error.kind() == std::io::ErrorKind::NotFound => return Ok(command),
        Err(error) => return Err(error).with_context(|| name.to_string()),
    };
    let table: toml::Table = text.parse().with_context(|| name.to_string())?;
    let mut unknown: BTreeSet<String> = table.keys().cloned().collect();
    let mut values = Vec::new();
    for (key, value) in &table {
        if key == ACCESS && value.is_table() {
            unknown.remove(key);
            continue;
        }
        let value = match value {
            toml::Value::String(text) => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Boolean(yes) => yes.to_string(),
            _ => bail!("{name}: {key} must be a string, a number, true or false"),
        };
        values.push((key.clone(), value));
    }
    let command = apply(command, &values, &mut unknown);
    if let Some(key) = unknown.first() {
        bail!("{name}: there is no option {key:?}; see `lamina --help`");
    }
    Ok(command)
}

fn apply(
    command: clap::Command,
    values: &[(String, String)],
    unknown: &mut BTreeSet<String>,
) -> clap::Command {
    let command = command.mut_args(|argument| {
        let long = argument.get_long().map(str::to_owned);
        match values.iter().find(|(key, _)| long.as_deref() == Some(key) && key != "config") {
            Some((key, value)) => {
                unknown.remove(key);
                argument.default_value(value.clone())
            }
            None => argument,
        }
    });
    command.mut_subcommands(|subcommand| apply(subcommand, values, unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(file: &str, words: &[&str]) -> Result<Arguments> {
        let path = tempfile::NamedTempFile::new()?;
        std::fs::write(path.path(), file)?;
        let command = with_file(Arguments::command(), path.path(), true)?;
        let words = std::iter::once(&"lamina").chain(words);
        Ok(Arguments::from_arg_matches(&command.try_get_matches_from(words)?)?)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = "log = \"debug\"\nplain-http = true\ncache-mib = 100\n";
        let words = ["mount", "r/a", "/m", "--log", "info"];
        let arguments = parsed(file, &words).unwrap();
        assert_eq!(arguments.common.log, "info");
        assert!(arguments.common.plain_http);
        let crate::args::Command::Mount(mount) = arguments.command else { panic!("not a mount") };
        assert_eq!(mount.settings.cache_mib, 100);
        assert_eq!(mount.settings.deadline, 30);
    }

    #[test]
    fn the_configuration_of_a_program_that_is_run_is_not_ours() {
        let words = ["lamina", "run", "r/a", "--", "serve", "--config", "its.toml"].map(OsString::from);
        assert_eq!(file(&words[..]).filter(|(_, named)| *named), None);
        assert_eq!(file(&words[4..]), Some((PathBuf::from("its.toml"), true)));
    }

    #[test]
    fn unknown_keys_and_wrong_values_are_named() {
        let error = parsed("cahce = \"/x\"", &["node"]).unwrap_err();
        assert!(error.to_string().contains("\"cahce\""), "{error}");
        let error = parsed("cache = [1]", &["node"]).unwrap_err();
        assert!(error.to_string().contains("cache must be"), "{error}");
    }
}
