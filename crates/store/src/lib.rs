//! Durable truth over an object store: blobs, packs, index, references.
