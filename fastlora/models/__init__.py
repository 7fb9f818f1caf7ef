"""What has to be known of a Hugging Face model: its targets, its two ends, shared weights and repeated layers."""
