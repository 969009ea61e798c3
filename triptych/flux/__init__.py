"""The Flux multiview model: from a sentence or given views to a 2x2 sheet of the four views."""
