"""How good a model is: k-NN on frozen features, confusion counts, boxes by COCO's definition, small targets."""
