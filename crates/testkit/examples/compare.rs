//! `compare LEFT RIGHT`: whether two directories are the same file system in every attribute and byte.
//! What was measured on real images was measured with this.

use std::path::PathBuf;
use std::process::ExitCode;

use lamina_testkit::compare::Compare;

fn main() -> anyhow::Result<ExitCode> {
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(left), Some(right)) = (paths.next(), paths.next()) else {
        anyhow::bail!("usage: compare LEFT RIGHT");
    };
    let compared = Compare::default().trees(&left, &right)?;
    for difference in &compared.differences {
        println!("{difference}");
    }
    println!(
        "{} entries, {} bytes, {} differences",
        compared.entries,
        compared.bytes,
        compared.differences.len()
    );
    Ok(if compared.differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
