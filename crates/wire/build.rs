//! Compiles proto/ into Rust, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=../../proto");
    let files = protox::compile(
        ["lamina/v1/push.proto", "lamina/v1/node.proto", "lamina/v1/profile.proto"],
        ["../../proto"],
    )?;
    tonic_prost_build::configure().build_transport(false).compile_fds(files)?;
    Ok(())
}
