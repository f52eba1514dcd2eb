"""Getting data: COCO from its host or Kaggle, Flickr archives, own tables of links."""
