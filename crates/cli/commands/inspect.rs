//! `lamina inspect`.

use anyhow::Result;
use lamina_image::{Document, media_type};
use lamina_wire::Client;

use super::{client_config, mib};
use crate::args::{Common, InspectArguments};
use crate::source::{Remote, host_platform};

/// Prints what a registry has of an image.
pub(crate) async fn run(arguments: InspectArguments, common: Common) -> Result<()> {
    let reference = &arguments.reference;
    let client = Client::new(&reference.host, client_config(&common)?)?;
    let (fetched, document) = Remote::manifest(&client, reference, &host_platform()).await?;
    let repository = &reference.repository;
    let mut status = match client.image_status(repository, fetched.digest).await {
        Ok(status) => serde_json::from_slice(&status)?,
        Err(error) if error.is_not_found() => serde_json::Value::Null,
        Err(error) => return Err(error.into()),
    };
    let referrers = client.referrers(repository, fetched.digest, media_type::TREE).await?;
    let (layers, bound) = match &document {
        Document::Manifest(manifest) => (manifest.layers.clone(), manifest.bound_tree()?),
        Document::Index(_) => (Vec::new(), None),
    };
    let tree = bound.map(|digest| digest.to_string());
    let tree = tree.or_else(|| {
        referrers.iter().find_map(|one| one.annotations.get(lamina_image::TREE_ANNOTATION).cloned())
    });
    if arguments.json {
        let report = serde_json::json!({
            "reference": reference.to_string(),
            "manifest": fetched.digest,
            "mediaType": fetched.media_type,
            "layers": layers,
            "tree": tree,
            "bound": bound.is_some(),
            "conversion": status,
        });
        println!("{report}");
        return Ok(());
    }
    println!("{reference}\nmanifest  {} ({})", fetched.digest, fetched.media_type);
    let rebuilt = status.as_object_mut().and_then(|status| status.remove("rebuilt")).unwrap_or_default();
    for layer in &layers {
        let is_rebuilt = rebuilt.as_array().is_some_and(|all| all.contains(&layer.digest.to_string().into()));
        let kept = if is_rebuilt { ", rebuilt when it is asked for" } else { "" };
        println!("layer     {} {:>12}  {}{kept}", layer.digest, mib(layer.size), layer.media_type);
    }
    match (&tree, bound) {
        (Some(tree), Some(_)) => println!("tree      {tree}, named by the manifest"),
        (Some(tree), None) => println!("tree      {tree}, named by the registry"),
        (None, _) => println!("tree      none: it cannot be mounted lazily"),
    }
    if let serde_json::Value::Object(status) = status {
        for (name, value) in status {
            println!("{name:9} {value}");
        }
    }
    Ok(())
}
