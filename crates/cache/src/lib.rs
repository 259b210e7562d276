//! Where a node gets bytes: memory, disk, registry.
