"""Photos and videos: reading and writing them, and finding and following the faces in them."""
