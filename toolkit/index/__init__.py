"""From stored vectors to a published index: build, search, measure, curate."""
