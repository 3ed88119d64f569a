"""What the pages of both hosts are answered with. It knows no host, and needs none of the engine's libraries."""
