"""What the compiler pass searches with: a graph as terms, and patterns matched against them."""
