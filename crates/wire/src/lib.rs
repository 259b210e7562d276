//! What two processes say to each other, both ends: OCI client, ranges, push, retries.
