"""What sits on an encoder in a downstream task: modules that read its feature maps. No I/O, no losses."""
