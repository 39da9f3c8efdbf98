"""From pixels to stored vectors: spec, weights, encoder, runner, store."""
