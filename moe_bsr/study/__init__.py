"""Studies: arms trained at equally many images with several seeds, and what differs between them."""
