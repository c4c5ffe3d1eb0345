"""What is said: decoding, the published defaults of each family and task, images, and `Blip2`."""
