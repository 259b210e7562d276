//! `lamina pin`.

use anyhow::Result;
use lamina_wire::proto::{PinRequest, PinResponse};

use super::mib;
use super::mount::{asked, make_cache};
use crate::args::{Common, PinArguments};

/// Pins an image, takes a pin away, or lists pins.
pub(crate) async fn run(arguments: PinArguments, common: Common) -> Result<()> {
    let request = PinRequest {
        reference: arguments.reference.as_ref().map(ToString::to_string).unwrap_or_default(),
        plain_http: common.plain_http,
        remove: arguments.remove,
    };
    make_cache(&arguments.cache)?;
    let (cache, settings) = (&arguments.cache, &arguments.settings);
    let pinned = asked(cache, settings, &common, async |node| node.pin(&request).await).await?;
    print(&pinned, arguments.json);
    Ok(())
}

fn print(pinned: &PinResponse, json: bool) {
    if json {
        let pins = pinned.pins.iter().map(|pin| {
            serde_json::json!({ "reference": pin.reference, "manifest": pin.manifest, "bytes": pin.bytes })
        });
        let pins: Vec<_> = pins.collect();
        let all = serde_json::json!({ "pins": pins, "bytes": pinned.bytes, "bytes_max": pinned.bytes_max });
        println!("{all}");
        return;
    }
    for pin in &pinned.pins {
        println!("{:>12}  {}  {}", mib(pin.bytes), pin.manifest, pin.reference);
    }
    println!("{:>12}  of {} that may be pinned", mib(pinned.bytes), mib(pinned.bytes_max));
}
