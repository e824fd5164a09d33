"""From a user's batch, step output and forward hooks to images, targets and scores."""
