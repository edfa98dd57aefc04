"""The captions that the job tests fuse."""


def captions(shard, count):
    return [
        {
            "image_url": f"https://example.com/{shard}/{i}.jpg",
            "laion_2b": f"Lighthouse No. {i} at Cape {shard.title()}, {1900 + i % 100}",
            "laion_coco": "A white lighthouse stands on a rocky coast.",
            "width": 640 + i,
        }
        for i in range(count)
    ]
