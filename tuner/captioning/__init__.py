"""`tuner caption`: new captions by a local model, filtered with the old ones by how they match (CapFilt).

CapFilt is section 3.3 of BLIP (arXiv 2201.12086): a captioner adds synthetic captions, a filter takes out
noisy ones of both kinds.
"""
