"""A folder of images, checked before it is trained on."""
