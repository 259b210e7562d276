//! What an image is: tar, OCI documents, recipe, tree, packs and the cutting of layers into them.
