"""Distances between features of pictures instead of between pixels: VGG-19, contextual losses, ST-LPIPS."""
