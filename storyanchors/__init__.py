"""What data_pipeline/, train/ and infer/ share: stories, clips, conditioning, network, flow, codec."""
