//! Images that come with their tree.
