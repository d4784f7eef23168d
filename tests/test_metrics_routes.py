from deployments.metrics_routes import exposition

NODE = """# HELP ray_lda_tokens_total tokens drawn
# TYPE ray_lda_tokens_total counter
ray_lda_tokens_total{{WorkerId="x",deployment="LDAReplica",replica="{replica}"}} {value}
# HELP ray_node_cpu no business of ours
# TYPE ray_node_cpu gauge
ray_node_cpu{{}} 3
# HELP ray_serve_actual_batch_size requests in a batch
# TYPE ray_serve_actual_batch_size histogram
ray_serve_actual_batch_size_bucket{{le="1",WorkerId="x",replica="{replica}"}} 1
ray_serve_actual_batch_size_sum{{WorkerId="x",replica="{replica}"}} 1
"""


def test_several_nodes_are_one_text() -> None:
    nodes = [NODE.format(replica="a", value="3.0"), NODE.format(replica="b", value="1e+09")]
    assert exposition(nodes) == (
        "# HELP lda_tokens_total tokens drawn\n"
        "# TYPE lda_tokens_total counter\n"
        'lda_tokens_total{deployment="LDAReplica",replica="a"} 3.0\n'
        'lda_tokens_total{deployment="LDAReplica",replica="b"} 1000000000.0\n'
        "# HELP serve_actual_batch_size requests in a batch\n"
        "# TYPE serve_actual_batch_size histogram\n"
        'serve_actual_batch_size_bucket{le="1",replica="a"} 1.0\n'
        'serve_actual_batch_size_sum{replica="a"} 1.0\n'
        'serve_actual_batch_size_bucket{le="1",replica="b"} 1.0\n'
        'serve_actual_batch_size_sum{replica="b"} 1.0\n'
    )


def test_what_only_a_label_of_rays_told_apart_is_added_up() -> None:
    """A page with two samples of the same labels is no page that Prometheus takes."""
    text = (
        "# TYPE ray_serve_deployment_request_counter_total counter\n"
        'ray_serve_deployment_request_counter_total{deployment="Ingress",route="/ready"} 2.0\n'
        'ray_serve_deployment_request_counter_total{deployment="Ingress",route="/score"} 5.0\n'
    )
    assert exposition([text]).splitlines()[1:] == [
        'serve_deployment_request_counter_total{deployment="Ingress"} 7.0'
    ]


def test_what_is_no_exposition_gives_nothing() -> None:
    assert exposition(["", "garbage\n# TYPE\nray_lda_x 3\n"]) == ""
