"""ClusterKV reads the clusters of keys that promise most, wherever in the text their tokens stand."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import kvlib
from kvlib import census, recall
from kvlib.policies import RecipeError
from kvlib.testing import CHECKS, check_policy
from tests.reader import SPEC, Reader, attention_over, check_read, cloud, lists_of, places, ranked, together

ALL = " + sink=0 + recent=1 + block=1"  # all but the newest token of the prompt is body


def directions(seed, n, d):
    """n orthogonal directions [n, d]."""
    return torch.linalg.qr(cloud(seed, d, d))[0][:n]


def planted(seed, noise=0.1, d=16):
    """Keys [1, 1, 513, d] along eight orthogonal directions, interleaved, and a last one of zero; and the directions."""
    axes = directions(seed, 8, d)
    return F.pad(axes.repeat(64, 1) + noise * cloud(seed + 1000, 512, d), (0, 0, 0, 1))[None, None], axes


def filled(recipe, k):
    """A reader of the prompt k [1, H, n, d]."""
    reader = Reader(recipe, k.shape[1], k.shape[2] + 8)
    reader.fill(k)
    return reader


class Topics:
    """A text each of whose tokens is about one of some topics, k [1, 2, T, 32]; a query asks for one of them."""

    def __init__(self, tokens=1025, topics=40, seed=0):
        self.topic = F.normalize(cloud(seed, 2, topics, 32), dim=-1)
        about = torch.randint(topics, (tokens,), generator=torch.Generator().manual_seed(seed))
        offset = 6 * F.normalize(cloud(seed + 1, 2, 1, 32), dim=-1)
        self.k = (offset + 4 * self.topic[:, about] + 0.3 * cloud(seed + 2, 2, tokens, 32))[None]

    def query(self, i):
        return (4 * self.topic[:, i, None] + 0.2 * cloud(1000 + i, 2, 2, 32)).view(1, 4, 1, 32)

    def attention(self, i):
        """Of a query to everything, itself as a key of zero included, [Hq, T + 1]."""
        k = F.pad(self.k[0], (0, 0, 0, 1)).repeat_interleave(2, 0)
        return torch.einsum("hd,htd->ht", self.query(i)[0, :, 0] * SPEC.scale, k).softmax(-1)

    def recall(self, recipe, budget):
        """Average share of the tokens that get most of a group's attention among those that are read."""
        reader, found = filled(recipe.format(budget), self.k), []
        for i in range(12):
            best = self.attention(i).view(2, 2, -1).sum(1).topk(budget).indices
            found.append((reader.ask(self.query(i))[0, ::2] > 0).gather(1, best).float().mean().item())
        return np.mean(found)

    def error(self, recipe):
        """Average relative distance from the output of full attention, values being random."""
        reader, found, values = filled(recipe, self.k), [], cloud(99, self.k.shape[2] + 1, 16)
        for i in range(12):
            exact, got = self.attention(i) @ values, reader.ask(self.query(i))[0, :, : len(values)] @ values
            found.append(((got - exact).norm() / exact.norm()).item())
        return np.mean(found)


# ---------------------------------------------------------------------------------------------------------- the index
def check_index(reader, k, row=0):
    """Clusters permute the tokens sealed, and each is known by the mean of its keys; returns them, [heads][clusters]."""
    body, sinks = reader.group.body, 0 if reader.group.sink is None else int(reader.group.sink.counts[row, 0])
    found = reader.members(row)
    for h, clusters in enumerate(found):
        flat = [t for cluster in clusters for t in cluster]
        assert sorted(flat) == list(range(sinks, sinks + int(body.counts[row])))
        assert flat == body.positions(row, h).tolist()
        assert all(cluster == sorted(cluster) for cluster in clusters)
        for u, cluster in enumerate(clusters):
            wanted = k[row, h, cluster].mean(0) if cluster else torch.zeros(k.shape[-1])
            torch.testing.assert_close(body.units.parts["centroid"][row, h, u], wanted, atol=1e-5, rtol=1e-5)
    return found


def test_clusters_are_a_permutation_of_what_was_sealed():
    k = cloud(1, 1, 2, 150, 8)
    reader = filled("clusterkv(budget=64, cluster=6)", k)
    assert reader.split() == (8, 150 - 8 - 32, 150)
    clusters = check_index(reader, k)
    assert [len(of_head) for of_head in clusters] == [round(110 / 6)] * 2
    assert clusters[0] != clusters[1]
    assert [len(of_head) for of_head in check_index(filled("clusterkv(budget=64)", k), k)] == [round(110 / 16)] * 2


def test_a_full_block_becomes_clusters_of_its_own_and_the_old_ones_stay():
    q, k = cloud(0, 1, 4, 230, 8), cloud(1, 1, 2, 230, 8)
    reader = Reader("clusterkv(budget=64, cluster=5)", 2)
    reader.fill(k[:, :, :150])
    before, centroids, blocks = check_index(reader, k), reader.group.body.units.live("centroid").clone(), []
    for t in range(150, 230):
        sealed = sum(reader.split()[:2])
        reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])
        now, after = sum(reader.split()[:2]), check_index(reader, k)
        if now == sealed:
            assert after == before
            continue
        blocks.append(t)
        assert now == sealed + 16
        for h in range(2):
            assert after[h][: len(before[h])] == before[h]
            fresh = after[h][len(before[h]) :]
            assert len(fresh) == 3  # 16 tokens, 5 to a cluster
            assert sorted(t for cluster in fresh for t in cluster) == list(range(sealed, now))
        units = reader.group.body.units.live("centroid")
        assert torch.equal(units[:, :, : centroids.shape[2]], centroids)
        before, centroids = after, units.clone()
    assert blocks == [165, 181, 197, 213, 229]


def test_a_long_prompt_is_clustered_in_segments(monkeypatch):
    """What is in one segment does not depend on those after it."""
    monkeypatch.setattr(recall, "SEGMENT", 64)
    k = cloud(1, 1, 2, 250, 8)
    whole, part = filled("clusterkv(budget=48, cluster=8)", k), filled("clusterkv(budget=48, cluster=8)", k[:, :, :160])
    clusters, fewer = check_index(whole, k), check_index(part, k)
    sinks, body, _ = whole.split()
    for h in range(2):
        first, last = ([(end(cluster) - sinks) // 64 for cluster in clusters[h] if cluster] for end in (min, max))
        assert first == last == sorted(first)
        assert clusters[h][:16] == fewer[h][:16]
        assert len(clusters[h]) == 8 * (body // 64) + round(body % 64 / 8)


def test_the_same_keys_are_not_clustered_the_same_way_twice(monkeypatch):
    """Else what one segment hides the others hide too."""
    monkeypatch.setattr(recall, "SEGMENT", 64)
    k = F.pad(cloud(0, 1, 1, 64, 8).repeat(1, 1, 2, 1), (0, 0, 0, 1))
    clusters = check_index(filled("clusterkv(budget=48, cluster=8)" + ALL, k), k)[0]
    assert clusters[8:] != [[t + 64 for t in cluster] for cluster in clusters[:8]]


def test_text_that_comes_at_once_has_the_clusters_of_text_that_comes_bit_by_bit():
    q, k = cloud(0, 1, 4, 230, 8), cloud(1, 1, 2, 230, 8)
    once, bits = Reader("clusterkv(budget=64, cluster=5)", 2), Reader("clusterkv(budget=64, cluster=5)", 2)
    for reader in (once, bits):
        reader.fill(k[:, :, :150])
    once.feed(q[:, :, 150:200], k[:, :, 150:200])
    bits.steps(q[:, :, :200], k[:, :, :200], 150)
    assert check_index(once, k) == check_index(bits, k)
    assert len(once.members()[0]) == 22 + 3 * 3
    torch.testing.assert_close(once.steps(q, k, 200), bits.steps(q, k, 200), atol=1e-6, rtol=1e-5)


def test_planted_directions_become_clusters():
    for seed, backend in itertools.product(range(4), ("torch", "faiss")):
        k, _ = planted(seed)
        clusters = check_index(filled(f"clusterkv(budget=66, cluster=64, backend={backend})" + ALL, k), k)[0]
        assert sorted(clusters) == [list(range(c, 512, 8)) for c in range(8)]


def test_a_cluster_far_above_the_average_is_kept_in_parts():
    """Of at most four times the average, by position; they stand side by side."""
    axes = directions(0, 8, 8)
    about = (torch.arange(300) % 10 == 0).long()
    k = F.pad(axes[about].view(1, 1, 300, 8), (0, 0, 0, 1))
    clusters = check_index(filled("clusterkv(budget=64, cluster=10)" + ALL, k), k)[0]
    many, few = ([t for t in range(300) if about[t] == x] for x in (0, 1))
    parts = [many[i : i + 40] for i in range(0, len(many), 40)]
    assert [len(part) for part in parts] == [40] * 6 + [30]
    assert clusters in ([*parts, few], [few, *parts])


def test_what_is_written_in_the_recipe_reaches_the_clusters():
    k = cloud(0, 1, 1, 300, 8) + torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0])

    def clusters(more="", first=0):
        reader = Reader(f"clusterkv(budget=64, cluster=10{more})", first=first)
        reader.fill(k)
        return check_index(reader, k)[0]

    plain = clusters()
    assert plain == clusters(", iterations=40")  # it has settled
    for more in (", seed=1", ", iterations=1", ", centre=False"):
        assert clusters(more) != plain
        assert clusters(more) == clusters(more)
    assert clusters(", backend=faiss") != plain
    assert clusters(first=5) != plain  # every head of a model starts elsewhere


# ----------------------------------------------------------------------------------------------------- rows and heads
@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("tier", ["", " @ host"])
def test_a_row_has_the_clusters_it_would_have_alone(estimate, tier):
    recipe = f"clusterkv(budget=48, cluster=6, estimate={estimate}){tier}"
    q, k = cloud(7, 3, 4, 190, 8), cloud(8, 3, 2, 190, 8)
    k[2, :, :131] = k[1, :, :131]
    lengths, turn = (70, 131, 131), [2, 0, 1]
    batch, reader = together(recipe, q, k, lengths, [0, 1, 2], 40, heads=2)
    turned, other = together(recipe, q, k, lengths, turn, 40, heads=2)
    for row in range(3):
        alone, single = together(recipe, q, k, lengths, [row], 40, heads=2)
        clusters = check_index(single, k[row : row + 1])
        assert check_index(reader, k, row) == clusters
        assert check_index(other, k[turn], turn.index(row)) == clusters
        torch.testing.assert_close(batch[row], alone[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(turned[turn.index(row)], alone[0], atol=1e-6, rtol=1e-5)
    of_prompt = round((131 - 6 - 24) / 6)
    one, same = (check_index(reader, k, row)[0] for row in (1, 2))
    assert one[:of_prompt] == same[:of_prompt]
    assert one != same


def test_a_row_whose_text_was_short_so_far_is_clustered_as_it_would_be_alone():
    """In another turn 48 tokens of both rows are due: of one they are the first, of the other three blocks."""
    q, k = cloud(7, 2, 4, 220, 8), cloud(8, 2, 2, 220, 8)
    recipe, lengths = "clusterkv(budget=64, cluster=6)", (37, 149)

    def turns(rows):
        reader = together(recipe, q, k, lengths, rows, 1, heads=2)[1]
        chunk = [torch.stack([x[r, :, lengths[r] + 1 : lengths[r] + 51] for r in rows]) for x in (q, k)]
        reader.feed(*chunk)
        return reader

    both = turns([0, 1])
    for row, count in ((0, 8), (1, 18 + 9)):
        clusters = check_index(turns([row]), k[row : row + 1])
        assert len(clusters[0]) == count
        assert check_index(both, k, row) == clusters


def test_a_head_has_the_clusters_it_would_have_alone():
    k = cloud(0, 1, 1, 300, 8).repeat(1, 3, 1, 1)
    three, alone = filled("clusterkv(budget=64, cluster=10)", k), Reader("clusterkv(budget=64, cluster=10)", first=1)
    alone.fill(k[:, :1])
    assert three.members()[1] == alone.members()[0]
    assert three.members()[0] != three.members()[1] != three.members()[2]


# -------------------------------------------------------------------------------------------------------- what is read
def promise(q, k, cluster):
    return (k[cluster].mean(0) @ q).item() if cluster else -np.inf


@pytest.mark.parametrize(
    "recipe",
    [
        "clusterkv(budget=64, cluster=6)",
        "clusterkv(budget=64, cluster=6, scope=query_head)",
        "clusterkv(budget=64, cluster=30, backend=faiss)",
        "clusterkv(budget=24, cluster=6) + sink=0 + recent=2",
        "clusterkv(budget=8, cluster=6)",
        "clusterkv(budget=64, cluster=6) @ host",
        "clusterkv(budget=64, cluster=6) @ host(attend=True)",
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_every_step_reads_its_budget_of_the_best_clusters(recipe, group):
    """A prefix of the order by score, of the cluster that is cut the tokens of largest true score, and what is newer."""
    method, heads, prompt = kvlib.Recipe.parse(recipe).select, 2, 130
    q, k = cloud(3, 1, 2 * group, 180, 8), cloud(4, 1, heads, 180, 8)
    seen = k[0].repeat_interleave(group, 0)
    reader = Reader(recipe, heads)
    reader.feed(q[:, :, :prompt], k[:, :, :prompt])
    reader.group.finish_prefill()
    for t in range(prompt, 180):
        sinks, body, _ = reader.split()
        clusters, now = reader.members(), q[0, :, t]
        p = reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])[0, :, 0]
        assert (p > 0).sum(-1).tolist() == [method.budget] * 2 * group
        always = [*range(sinks), *range(sinks + body, t + 1)]
        for sharing in lists_of(method.scope, 2 * group, heads):
            units = clusters[sharing[0] // group]
            score = {h: [promise(now[h], seen[h], unit) for unit in units] for h in sharing}
            order = ranked(score, now, seen, always, sharing)
            for h in sharing:
                check_read(p[h] > 0, order, units, always, method.budget - len(always), now, seen, sharing)
                torch.testing.assert_close(p[h], attention_over(p[h] > 0, now[h], seen[h]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tier", ["", " @ host", " @ host(attend=True)"])
def test_heads_that_agree_cut_a_cluster_at_its_best_tokens(tier):
    """The later a key, the longer: the first tokens in the order they are kept in are the worst."""
    k, axes = planted(0, noise=0)
    k *= torch.linspace(1, 2, 513)[:, None]
    reader = filled("clusterkv(budget=42, cluster=64)" + ALL + tier, k)
    q = axes[3] + torch.stack([0.1 * axes[4], 0.1 * axes[5]])
    read = [places(p > 0) for p in reader.ask(q.view(1, 2, 1, 16))[0]]
    assert read == [[*range(3 + 8 * 24, 512, 8), 512, 513]] * 2


@pytest.mark.parametrize("tier", ["", " @ host", " @ host(attend=True)"])
def test_heads_that_disagree_each_get_something_of_a_cut_cluster(tier):
    """One likes a token among alike ones, another a different one."""
    k, axes = planted(0, noise=0)
    k[0, 0, 3 + 8 * 40] += 0.5 * axes[4]
    k[0, 0, 3 + 8 * 50] += 0.5 * axes[5]
    reader = filled("clusterkv(budget=8, cluster=64)" + ALL + tier, k)
    for one, other in ((4, 5), (5, 4)):
        q = 8 * torch.stack([axes[3] + axes[one], axes[3] + axes[other]])
        read = [places(p > 0) for p in reader.ask(q.view(1, 2, 1, 16))[0]]
        assert read == [[3, 11, 19, 27, 3 + 8 * 40, 3 + 8 * 50, 512, 513]] * 2


def test_clusters_without_tokens_have_no_vote():
    """Two directions in more clusters than that; what is empty would promise zero, more than any key has to give."""
    axes = directions(0, 8, 8)
    newest = 2 * axes[1].view(1, 1, 1, 8)
    two, four = (axes[torch.arange(80) % n].view(1, 1, 80, 8) for n in (2, 4))
    k = torch.cat([torch.cat([two, four], 1), newest.expand(-1, 2, -1, -1)], 2)  # the second head needs more clusters
    reader = filled("clusterkv(budget=42, cluster=20, centre=False)" + ALL, k)
    assert sorted(reader.members()[0]) == [[], [], list(range(0, 80, 2)), list(range(1, 80, 2))]
    # Of all that one head sees it dislikes the even tokens least; another prefers the odd ones a little.
    q = torch.stack([-40 * axes[0] - 80 * axes[1], -0.5 * axes[0] + 0.5 * axes[1]])
    for h, first in (((0,), 0), ((1,), 1), ((0, 1), 0)):
        both = q[list(h)].repeat(2, 1).view(1, -1, 1, 8)
        read = reader.ask(both, newest.expand(-1, 2, -1, -1))[0, 0] > 0
        assert places(read) == [*range(first, 80, 2), 80, 81]


def test_what_an_evictor_left_is_clustered():
    """Of what h2o_prefill keeps of the prompt, with gaps, a query reads some."""
    q, k = cloud(3, 1, 2, 180, 8), cloud(4, 1, 1, 180, 8)
    reader = Reader("h2o_prefill(budget=100) + clusterkv(budget=40, cluster=6)")
    reader.feed(q[:, :, :140], k[:, :, :140])
    reader.group.finish_prefill()
    clusters = reader.members()[0]
    of_prompt = {t for cluster in clusters for t in cluster}
    assert max(of_prompt) - min(of_prompt) > len(of_prompt)
    for cluster, centroid in zip(clusters, reader.group.body.units.live("centroid")[0, 0], strict=True):
        torch.testing.assert_close(centroid, k[0, 0, cluster].mean(0), atol=1e-5, rtol=1e-5)
    for t in range(140, 180):
        p = reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])[0, :, 0]
        held = census.positions(reader.group)[0][0].tolist()
        assert len(held) == 100 + t - 139
        for h in range(2):
            assert (p[h] > 0).sum() == 40
            assert set(places(p[h] > 0)) <= set(held)
            torch.testing.assert_close(p[h], attention_over(p[h] > 0, q[0, h, t], k[0, 0]), atol=1e-6, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- recall
def test_it_finds_what_pages_scatter():
    """A direction's keys never stand side by side: of sixteen neighbours two are of it."""
    for seed in range(3):
        k, axes = planted(seed)
        for recipe, share in (
            ("clusterkv(budget=66, cluster=64)" + ALL, 1),
            ("quest(budget=66) + sink=0 + recent=1", 0.125),
        ):
            reader = filled(recipe, k)
            assert reader.split() == (0, 512, 513)
            for c in range(8):
                read = set(places(reader.ask(8 * axes[c].view(1, 1, 1, -1))[0, 0] > 0))
                assert len(read) == 66 and read >= {512, 513}
                assert len(read & set(range(c, 512, 8))) / 64 == share


def test_recall_rises_with_the_budget_and_both_backends_find_the_same():
    data, budgets = Topics(), (32, 64, 128, 256, 512)
    recipes = (f"clusterkv(budget={{}}, backend={x})" for x in ("torch", "faiss"))
    one, other, pages = ([data.recall(recipe, b) for b in budgets] for recipe in (*recipes, "quest(budget={}, page=8)"))
    assert one == sorted(one)
    assert all(a > b + 0.2 for a, b in zip(one, pages, strict=True))
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 0.01


# ---------------------------------------------------------------------------------------------------------- estimation
@pytest.mark.parametrize(
    "recipe",
    [
        "clusterkv(budget=64, cluster=6{})",
        "clusterkv(budget=40, cluster=6{}) + sink=2 + recent=36 + block=2",  # from some to nothing is read of the body
        "clusterkv(budget=64, cluster=6{}) @ host",
        "clusterkv(budget=64, cluster=6{}) @ host(attend=True)",
    ],
)
def test_what_is_not_read_is_represented_by_its_mean(recipe):
    """Every cluster counts as many times its centroid, and mean value, as it has tokens that are not read."""
    q, k = cloud(3, 1, 4, 180, 8), cloud(4, 1, 2, 180, 8)
    exact, reader = (Reader(recipe.format(more), 2) for more in ("", ", estimate=True"))
    for each in (exact, reader):
        each.feed(q[:, :, :130], k[:, :, :130])
        each.group.finish_prefill()
    for t in range(130, 180):
        clusters = reader.members()
        assert clusters == exact.members()
        now = q[:, :, t : t + 1], k[:, :, t : t + 1]
        read, p = exact.feed(*now)[0, :, 0] > 0, reader.feed(*now)[0, :, 0]
        for h in range(4):
            seen = k[0, h // 2]
            tokens = places(read[h])
            left = [(cluster, len(set(cluster) - set(tokens))) for cluster in clusters[h // 2]]
            left = [(cluster, n) for cluster, n in left if n]
            s = [seen[tokens] @ q[0, h, t] * SPEC.scale]
            s += [(seen[cluster].mean(0) @ q[0, h, t] * SPEC.scale + np.log(n)).view(1) for cluster, n in left]
            share = torch.cat(s).softmax(-1)
            wanted = torch.zeros(320)
            wanted[tokens] = share[: len(tokens)]
            for (cluster, _), mass in zip(left, share[len(tokens) :], strict=True):
                wanted[cluster] += mass / len(cluster)
            torch.testing.assert_close(p[h], wanted, atol=1e-6, rtol=1e-4)


def test_an_estimate_is_never_more_than_the_true_mass():
    """By Jensen; so what is read gets at least its true share, and no more than without the estimate."""
    for seed in range(4):
        k, axes = planted(seed, noise=0.5)
        cut = filled("clusterkv(budget=66, cluster=64)" + ALL, k)
        reader = filled("clusterkv(budget=66, cluster=64, estimate=True)" + ALL, k)
        for c in range(8):
            q = 6 * (axes[c] + 0.3 * axes[c - 1]).view(1, 1, 1, -1)
            true = ((F.pad(k[0, 0], (0, 0, 0, 1)) @ q.flatten()) * SPEC.scale).softmax(-1)
            found, without = reader.ask(q)[0, 0, :514], cut.ask(q)[0, 0, :514]
            for t in (512, 513):  # read in any case
                assert true[t] < found[t] < without[t]


def test_equal_keys_are_estimated_exactly():
    k, axes = planted(0, noise=0)
    reader = filled("clusterkv(budget=66, cluster=64, estimate=True)" + ALL, k)
    for c in range(8):
        q = (6 * axes[c] + 5 * axes[c - 1] - axes[c - 2]).view(1, 1, 1, -1)
        true = ((F.pad(k[0, 0], (0, 0, 0, 1)) @ q.flatten()) * SPEC.scale).softmax(-1)
        torch.testing.assert_close(reader.ask(q)[0, 0, :514], true, atol=1e-7, rtol=1e-4)


def test_an_estimate_comes_nearer_to_full_attention():
    data = Topics()
    for budget in (64, 128, 256):
        near, far = (data.error(f"clusterkv(budget={budget}, estimate={x})") for x in (True, False))
        assert near < far / 4


# ------------------------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "clusterkv(backend=sklearn)",
            "clusterkv(backend=sklearn): unknown k-means backend 'sklearn': give 'torch' or 'faiss'",
        ),
        ("clusterkv(scope=layer)", "clusterkv(scope=layer): every KV head has clusters of its own: give kv_head"),
        ("clusterkv(scope=query_head, estimate=True)", "clusterkv(scope=query_head): estimate=True stands for what no"),
        ("clusterkv(scope=row)", "clusterkv(scope=row): give one of kv_head, layer, query_head"),
        ("clusterkv(scope=query_head) @ host", "clusterkv(scope=query_head): the query heads of a KV head would each"),
        ("clusterkv(budget=7)", "clusterkv(budget=7): clusterkv needs at least 8 tokens: give budget=8 or more"),
        ("clusterkv(cluster=0)", "clusterkv(cluster=0): give a whole number, 1 or more"),
        ("clusterkv(iterations=0)", "clusterkv(iterations=0): give a whole number, 1 or more"),
        ("clusterkv(seed=-1)", "clusterkv(seed=-1): give a whole number, 0 or more"),
        ("clusterkv(estimate=1)", "clusterkv(estimate=1): give True or False"),
        ("clusterkv(centre=0)", "clusterkv(centre=0): give True or False"),
        ("h2o(budget=64) + clusterkv(budget=48)", "clusterkv: it chooses among units that stay, and h2o drops single"),
        ("snapkv(budget=64, adaptive=True) + clusterkv(budget=48)", "clusterkv: snapkv(adaptive=True) leaves each head"),
    ],
)
def test_errors_name_the_value_and_the_remedy(recipe, message):
    with pytest.raises(RecipeError) as error:
        kvlib.Recipe.parse(recipe)
    assert str(error.value).startswith(message)


def test_a_backend_that_is_not_there_is_refused_with_its_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(RecipeError, match=r"clusterkv\(backend=faiss\).*pip install kvlib\[faiss\]"):
        kvlib.Recipe.parse("clusterkv(backend=faiss)")
    kvlib.Recipe.parse("clusterkv")


def test_the_contracts_are_kept():
    recipe = "clusterkv(budget=48, cluster=8, backend=faiss)"
    assert kvlib.Recipe.parse(str(kvlib.Recipe.parse(recipe))) == kvlib.Recipe.parse(recipe)
    assert check_policy(recipe) == [check.__name__ for check in CHECKS]


def test_a_cluster_of_many_alike_is_read_in_parts():
    """Half of the text says the same: its cluster is cut into pieces of four times the average."""
    k = cloud(0, 1, 1, 400, 8)
    k[:, :, ::2] = k[:, :, :1]
    reader = filled("clusterkv(budget=60, cluster=6)" + ALL, k)
    sizes = [len(cluster) for cluster in reader.members()[0]]
    assert sum(sizes) == int(reader.group.body.counts[0])
    assert max(sizes) == 24 == reader.group.body.longest
    assert sum(size == 24 for size in sizes) >= 7
