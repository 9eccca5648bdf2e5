from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from tests.data_pipeline.labeling.killed_labeling import (
    captions_bytes,
    files_with_key,
    label_all,
    labels_without_cost,
)


def test_faults_and_kills_change_no_label_and_no_answer_is_paid_twice(tmp_path):
    """benchmarks/labeling_faults.py is the same with 2,000 clips and 20 kills."""
    dataset = tmp_path / "dataset"
    write_dataset(
        dataset,
        WriteStoryWorldConfig(str(dataset), num_stories=6, num_frames=[6, 14], clips_per_shard=2, workers=1),
    )
    num_requests = {"global": 6, "events": 8, "story": 6}
    clean = label_all(dataset, "clean", rate=0.0, num_kills=0, num_requests=num_requests)
    hurt = label_all(dataset, "hurt", rate=0.05, num_kills=3, num_requests=num_requests, timeout_s=0.4)
    assert all(set(audit.statuses) <= {"ok", "warned"} for audit in clean)
    assert sum(audit.kills for audit in hurt) == 3 and sum(audit.faults.total() for audit in hurt) > 5
    for audit in clean + hurt:
        assert audit.repeated == 0
        assert abs(audit.balance) < 1e-9
    assert labels_without_cost(dataset, "hurt") == labels_without_cost(dataset, "clean")
    assert captions_bytes(dataset, "hurt") == captions_bytes(dataset, "clean") != {}
    assert files_with_key(dataset) == []
