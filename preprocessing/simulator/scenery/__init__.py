"""What the procedural scenes are made of: materials, drawing, and one module per subject."""
