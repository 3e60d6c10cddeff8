"""What a captioned scene is: its words, its shapes, and what a caption asks for."""
