// The explorer's page: chooses and draws what experiments/report/explorer.py computed (window.FARSIGHT). The address holds the
// whole selection, #view=curves&task=..&methods=..: every change writes it, and the page is drawn from it alone.
"use strict";
(() => {
  const data = window.FARSIGHT, root = document.getElementById("explorer");
  const VIEWS = { curves: "Curves", horizon: "How far to look ahead?", claims: "Claims" };
  const DASHES = [[], [8, 4], [2, 3]], BORDERS = ["solid", "dashed", "dotted"];
  const SIDES = { holds: "holds", "better than H = 0": "holds", "does not hold": "fails", "worse than H = 0": "fails" };
  const SVG = ["svg", "line", "circle", "rect", "title"];
  const unfolded = new Set();  // suites whose list of methods is open
  let state, plots = [];

  // ---------------------------------------------------------------- parts of a page

  function element(tag, attributes = {}, ...children) {
    const space = `http://www.w3.org/${SVG.includes(tag) ? "2000/svg" : "1999/xhtml"}`;
    const made = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false && value !== undefined) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat().filter((child) => child !== undefined && child !== ""));
    return made;
  }

  const p = (...children) => element("p", {}, ...children);
  const note = (...children) => element("p", { class: "muted" }, ...children);
  const heading = (level, ...children) => element(`h${level}`, {}, ...children);
  const link = (href, text, kind) => element("a", { href, class: kind }, text);
  const badge = (verdict) => element("span", { class: `verdict ${SIDES[verdict] ?? "open"}` }, verdict);
  const code = (text) => text.split("`").map((part, i) => i % 2 ? element("code", {}, part) : part);
  const taskName = (task) => task.replace("experiments.tasks-", "");

  function numeral(value) {
    if (value === null) return "";
    return Math.abs(value) < 10000 ? String(value) : value.toLocaleString("en").replaceAll(",", "\u202f");
  }

  function choice(label, options, value, changed) {
    const list = Object.entries(options).map(([key, text]) =>
      element("option", { value: key, selected: key === String(value) }, text));
    return element("label", {}, label, element("select", { onchange: (event) => changed(event.target.value) }, list));
  }

  // A head that is no text is the scale of a column of strips: where rows are blocks, on narrow screens, it stands above.
  function table(heads, rows) {
    const scale = heads.find((head) => typeof head !== "string");
    const cell = (content, i) => heads[i] === scale
      ? element("td", { class: "strip" }, content)
      : element("td", { "data-head": i > 0 && heads[i] }, content);
    const head = element("tr", {}, heads.map((text) => element("th", { scope: "col" }, text)));
    const body = rows.map((row) => element("tr", {}, row.map(cell)));
    return element("div", { class: "scroll" },
      element("div", { class: "above strip", "aria-hidden": "true" }, scale.cloneNode(true)),
      element("table", {}, element("thead", {}, head), element("tbody", {}, body)));
  }

  function scaleHead(text, [low, high]) {
    const ends = [low, high].map((end) => element("span", {}, numeral(end)));
    return element("div", {}, text, element("div", { class: "ends" }, ends));
  }

  // One dot a seed; mean and interval where there are any. What has no value stands at the right, hollow.
  function strip({ values, mean, low, high }, seeds, [least, most], colour = "currentColor", missing = "") {
    const at = (value) => `${most > least ? 4 + 88 * (value - least) / (most - least) : 48}%`;
    const texts = values.map((value, i) =>
      (seeds ? `seed ${seeds[i]}: ` : "") + (value === null ? missing : numeral(value)));
    const dots = values.map((value, i) => {
      const place = value === null ? { cx: "98%", fill: "none" } : { cx: at(value), fill: colour, "fill-opacity": 0.45 };
      return element("circle", { ...place, cy: "50%", r: 3.5, stroke: colour }, element("title", {}, texts[i]));
    });
    const bar = mean === undefined ? [] : [
      { x1: at(Math.max(least, low)), x2: at(Math.min(most, high)), y1: "50%", y2: "50%", "stroke-width": 2 },
      { x1: at(mean), x2: at(mean), y1: "15%", y2: "85%", "stroke-width": 3 },
    ];
    const lines = bar.map((line) => element("line", { ...line, stroke: colour }));
    return element("svg", { role: "img", "aria-label": texts.join(", ") }, lines, dots);
  }

  function range(values) {
    const known = values.flat().filter((value) => value !== null && value !== undefined);
    return [Math.min(...known), Math.max(...known)];
  }

  // ---------------------------------------------------------------- address and selection

  const methodsOf = (task) => Object.values(data.tasks[task].suites).flat();
  const largest = (tasks) => tasks.reduce((a, b) => methodsOf(b).length > methodsOf(a).length ? b : a, tasks[0]);

  function parse(hash) {
    const asked = new URLSearchParams(hash.replace(/^#/, "")), get = (name) => asked.get(name) ?? "";
    const task = data.tasks[get("task")] ? get("task") : largest(Object.keys(data.tasks));
    const view = VIEWS[get("view")] ? get("view") : asked.has("claim") ? "claims" : "curves";
    const { levels, suites } = data.tasks[task], measures = Object.keys(levels), known = methodsOf(task);
    const measure = measures.includes(get("measure")) ? get("measure") : measures[0];
    const level = levels[measure][get("level")] ? Number(get("level")) : Math.floor(levels[measure].length / 2);
    // The place of a method in the list is its colour: an empty place is kept.
    const methods = asked.has("methods")
      ? get("methods").split(",").map((key) => known.includes(key) ? key : "")
      : Object.values(suites)[0].slice(0, data.colours.length);
    const rest = { claim: get("claim"), verdict: get("verdict"), paper: get("paper") };
    return { view, task, methods, measure, level, seeds: get("seeds") === "1", ...rest };
  }

  function address({ view, task, methods, measure, level, seeds, claim, verdict, paper }) {
    const parts = view === "claims" ? { claim, verdict, paper } : { task };
    if (view === "curves") Object.assign(parts, { methods: methods.join(","), measure, level, seeds: seeds ? "1" : "" });
    const readable = (value) => encodeURIComponent(value).replaceAll("%2F", "/").replaceAll("%2C", ",");
    const kept = Object.entries(parts).filter(([name, value]) => name === "methods" || (value ?? "") !== "");
    return `#view=${view}` + kept.map(([name, value]) => `&${name}=${readable(value)}`).join("");
  }

  function change(changed) {
    Object.assign(state, changed);
    history.replaceState(null, "", address(state));
    draw();
  }

  function toggle(key) {
    const methods = [...state.methods], place = methods.indexOf(key), free = methods.indexOf("");
    if (place >= 0) methods[place] = "";
    else if (free >= 0) methods[free] = key;
    else methods.push(key);
    change({ methods });
  }

  function toggleAll(keys, on) {
    const others = state.methods.map((key) => keys.includes(key) ? "" : key);
    change({ methods: on ? [...state.methods, ...keys.filter((key) => !state.methods.includes(key))] : others });
  }

  const style = (i) => {
    const count = data.colours.length, dash = Math.floor(i / count) % DASHES.length;
    return { colour: data.colours[i % count], dash: DASHES[dash], border: BORDERS[dash] };
  };
  const swatch = ({ colour, border }) =>
    element("span", { class: "swatch", style: `border-color:${colour};border-top-style:${border}` });

  // What is chosen and has the measure: names, styles and numbers.
  function selection() {
    const known = (key) => key && data.methods[key].measures[state.measure];
    const chosen = state.methods.map((key, i) => known(key) && { key, ...style(i), ...data.methods[key], ...known(key) });
    return chosen.filter(Boolean);
  }

  const several = (chosen) => new Set(chosen.map((entry) => entry.suite)).size > 1;
  const named = (entry, chosen) => entry.name + (several(chosen) ? ` (${entry.suite})` : "");

  // ---------------------------------------------------------------- curves

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const WHOLE = Array.from({ length: 8 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();

  function axis(label, size) {
    const rule = { stroke: () => css("--rule"), width: 1 }, values = (_, ticks) => ticks.map(numeral);
    const fonts = { font: "12px system-ui, sans-serif", labelFont: "13px system-ui, sans-serif" };
    return { label, size, labelSize: 20, stroke: () => css("--ink"), grid: rule, ticks: rule, values, ...fonts };
  }

  // Columns for uPlot with what each of them is; intervals lie below seeds, and these below means.
  function layers(lines, always) {
    const tables = [], series = [{}], bands = [], marks = [];
    const add = (steps, values, mark, look) => {
      tables.push([steps, values]);
      marks.push(mark);
      return series.push({ spanGaps: true, ...look }) - 1;
    };
    const averaged = lines.map((line, number) => ({ line, number })).filter(({ line }) => line.mean);
    for (const { line } of averaged) {
      const unseen = { stroke: "transparent", width: 0, points: { show: false } };
      const [low, high] = [line.low, line.high].map((end) => add(line.steps, end, null, unseen));
      bands.push({ series: [high, low], fill: line.colour + "26" });
    }
    lines.forEach((line, number) => line.runs.forEach((run, seed) => {
      const look = { stroke: line.colour + "aa", width: 1, dash: line.dash, show: always || !line.mean };
      const points = { show: run.length < 12, size: 4, fill: line.colour };
      add(line.run_steps?.[seed] ?? line.steps, run, { line, number, seed }, { ...look, points });
    }));
    for (const { line, number } of averaged) {
      const points = { show: line.steps.length < 12, size: 6, fill: line.colour };
      add(line.steps, line.mean, { line, number }, { stroke: line.colour, width: 2, dash: line.dash, points });
    }
    return { joined: uPlot.join(tables), series, bands, marks };
  }

  // What a line has at a step, as the parts of a sentence.
  function values(line, step, seed, across) {
    const place = line.steps.indexOf(step), parts = [];
    if (line.mean && place >= 0) {
      parts.push(`mean ${numeral(line.mean[place])} [${numeral(line.low[place])}, ${numeral(line.high[place])}]`);
    }
    line.runs.forEach((run, i) => {
      const value = run[(line.run_steps?.[i] ?? line.steps).indexOf(step)];
      const text = `${line.each ?? "seed"} ${line.seeds[i]}: ${numeral(value ?? null)}`;
      if (value !== undefined) parts.push(element(i === seed ? "strong" : "span", {}, text));
    });
    const listed = parts.flatMap((part, i) => i ? [i === 1 && line.mean ? "; " : ", ", part] : [part]);
    return [swatch(line), element("strong", {}, line.name), `, ${across} ${numeral(step)}: `, ...listed];
  }

  // Each line: {name, colour, dash, border, steps, mean?, low?, high?, seeds, runs, run_steps?}. The sentence below the
  // plot says what is under the pointer, or at the place that the arrow keys choose.
  function curves(lines, title, across, along, always) {
    const keysHelp = "Arrow keys: left and right choose the place, up and down the method.";
    const host = element("div", { class: "plot", tabindex: 0, role: "group", "aria-label": `${title}. ${keysHelp}` });
    const readout = element("p", { class: "readout", role: "status" },
      "Point at a curve, or go there with the arrow keys: its mean, interval and single seeds.");
    root.append(host, readout);
    const { joined, series, bands, marks } = layers(lines, always);
    let shown = null, index = 0;  // line and place that are read out

    function show(number, place, seed) {
      if (shown !== number) {  // its single seeds, and no other's
        plot.batch(() => marks.forEach((mark, i) => {
          if (mark?.seed === undefined) return;
          plot.setSeries(i + 1, { show: always || !mark.line.mean || mark.number === number });
        }));
      }
      [shown, index] = [number, place];
      readout.replaceChildren(...values(lines[number], joined[0][place], seed, across));
    }

    function nearest(column, from) {  // the next place where this column has a value
      for (let away = 0; away < joined[0].length; away++)
        for (const place of [from - away, from + away]) if (joined[column][place] != null) return place;
      return null;
    }

    function hover() {
      const { left, top, idx } = plot.cursor;
      if (idx === null || idx === undefined || left < 0) return;
      const near = marks.map((mark, i) => {
        const place = mark && plot.series[i + 1].show ? nearest(i + 1, idx) : null;
        if (place === null) return { away: Infinity };
        const x = plot.valToPos(joined[0][place], "x"), y = plot.valToPos(joined[i + 1][place], "y");
        return { away: Math.hypot(x - left, y - top), mark, place };
      }).reduce((a, b) => b.away < a.away ? b : a);
      show(near.mark.number, near.place, near.mark.seed);
    }

    function keys(event) {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, ArrowUp: 0, ArrowDown: 0 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const turn = { ArrowUp: lines.length - 1, ArrowDown: 1 }[event.key] ?? 0;
      const number = shown === null ? 0 : (shown + turn) % lines.length, { steps, mean, runs } = lines[number];
      const before = Math.max(0, steps.findLastIndex((step) => step <= joined[0][index]));
      const move = shown === null && Number.isFinite(moves[event.key]) ? 0 : moves[event.key];
      const place = Math.min(steps.length - 1, Math.max(0, before + move));
      show(number, joined[0].indexOf(steps[place]));
      const at = { left: plot.valToPos(steps[place], "x"), top: plot.valToPos((mean ?? runs[0])[place], "y") };
      plot.setCursor(at, false);
    }

    const [low, high] = range(lines.flatMap((line) => line.runs)), margin = 0.05 * (high - low || 1);
    const x = { time: false, range: (_, from, to) => from === to ? [from - 1, to + 1] : [from, to] };
    const size = () => ({ width: Math.max(200, host.clientWidth), height: host.clientWidth < 500 ? 260 : 340 });
    const plot = new uPlot({
      ...size(), series, bands, legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { show: false } },
      scales: { x, y: { range: [low - margin, high + margin] } },  // of the returns there are, not of their intervals
      axes: [{ ...axis(across, 32), incrs: WHOLE }, axis(along, 52)],
      hooks: { setCursor: [(made) => made.cursor.event && hover()] },
    }, joined, host);
    host.addEventListener("keydown", keys);
    plots.push({ plot, size });
  }

  function drawCurves() {
    const { levels, suites } = data.tasks[state.task], chosen = selection(), measure = data.measures[state.measure];
    const tasks = Object.fromEntries(Object.keys(data.tasks).map((task) => [task, taskName(task)]));
    const measures = Object.fromEntries(Object.keys(levels).map((name) => [name, data.measures[name]]));
    const toTask = (task) => change(parse(`#view=curves&task=${encodeURIComponent(task)}&seeds=${state.seeds ? 1 : ""}`));
    const toMeasure = (name) => change({ measure: name, level: Math.floor(levels[name].length / 2) });
    const box = { type: "checkbox", id: "seeds", checked: state.seeds };
    const tick = element("input", { ...box, onchange: (event) => change({ seeds: event.target.checked }) });
    root.append(element("div", { class: "controls" }, choice("Task", tasks, state.task, toTask),
      choice("Measure", measures, state.measure, toMeasure), element("label", { class: "tick" }, tick, "all single seeds")));
    if (chosen.length) {
      const lines = chosen.map((entry) => ({ ...entry, name: named(entry, chosen) }));
      curves(lines, `${measure} of ${taskName(state.task)}`, "environment steps", measure, state.seeds);
    } else {
      root.append(element("p", { class: "readout", role: "status" }, "Nothing is chosen: tick a method below."));
    }
    for (const [suite, keys] of Object.entries(suites)) root.append(methods(suite, keys, chosen));
    if (!chosen.length) return;
    if (several(chosen)) {
      root.append(p("Methods of several suites are chosen: budgets and schedules may differ between suites."));
    }
    finals(chosen, measure);
    if (levels[state.measure].length) reaching(chosen, levels[state.measure]);
    root.append(p(link(location.href.split("#")[0] + address(state), "Link to this selection")));
  }

  function methods(suite, keys, chosen) {
    const count = keys.filter((key) => state.methods.includes(key)).length;
    const boxes = keys.map((key) => {
      const { name, measures } = data.methods[key], seeds = measures[state.measure]?.seeds.length ?? 0;
      const box = { type: "checkbox", id: key, checked: state.methods.includes(key), disabled: !seeds };
      const colour = chosen.find((entry) => entry.key === key);
      return element("label", {}, element("input", { ...box, onchange: () => toggle(key) }),
        element("span", {}, colour ? swatch(colour) : "", `${name} `,
          element("span", { class: "muted" }, `(${seeds} seed${seeds === 1 ? "" : "s"})`)));
    });
    const button = (text, on) =>
      element("button", { class: "all", id: `${text} ${suite}`, onclick: () => toggleAll(keys, on) }, text);
    const fold = (event) => unfolded[event.target.open ? "add" : "delete"](suite);
    return element("details", { class: "suite", open: unfolded.has(suite) || count > 0, ontoggle: fold },
      element("summary", {}, `Suite ${suite} `, element("span", { class: "muted" }, `(${count} of ${keys.length} chosen)`)),
      element("div", { class: "methods", role: "group", "aria-label": `Methods of suite ${suite}` }, boxes),
      p(button("all", true), " ", button("none", false)));
  }

  function finals(chosen, measure) {
    const seen = range(chosen.map((entry) => entry.final.values));
    const rows = chosen.map((entry) => [
      element("span", {}, swatch(entry), named(entry, chosen)), strip(entry.final, entry.seeds, seen, entry.colour),
      String(entry.seeds.length), entry.final.text, entry.final.bounds ?? "", entry.area.text, numeral(entry.end),
    ]);
    const scale = scaleHead(`final ${measure}`, seen);
    const few = chosen.some((entry) => entry.seeds.length < data.shown);
    root.append(heading(2, `Final ${measure}`),
      note("A run’s mean over its last ten evaluations (over their last half where there are fewer than twenty), at the ",
        "last step that all methods of its suite have. A dot is a seed, the bar the 95 % interval of their mean; ± is the ",
        "deviation over seeds. Area: mean over the steps.", few ? ` Fewer than ${data.shown} seeds have no interval.` : ""),
      table(["method", scale, "seeds", "mean ± deviation", "95 % interval", "area", "at step"], rows));
  }

  function reaching(chosen, levels) {
    const seen = [0, Math.max(...chosen.map((entry) => entry.steps.at(-1)))];
    const rows = chosen.map((entry) => [
      element("span", {}, swatch(entry), named(entry, chosen)),
      strip(entry.reach[state.level], entry.seeds, seen, entry.colour, "never"),
      entry.reach[state.level].text, numeral(entry.steps.at(-1)),
    ]);
    const level = choice("Level", { ...levels }, state.level, (wanted) => change({ level: Number(wanted) }));
    root.append(heading(2, "Steps to a level"), element("div", { class: "controls" }, level),
      note("The first step evaluated at the level or above. Median over the seeds that get there, and how many do; ",
        "a hollow dot at the right is a seed that never does."),
      table(["method", scaleHead("environment steps", seen), "median (seeds)", "length of the runs"], rows));
  }

  // ---------------------------------------------------------------- horizons

  function drawHorizons() {
    const having = Object.keys(data.tasks).filter((task) => Object.keys(data.tasks[task].horizons).length);
    if (!having.length) return root.append(p("No method was run with several horizons."));
    if (!having.includes(state.task)) state.task = largest(having);
    const tasks = Object.fromEntries(having.map((task) => [task, taskName(task)]));
    root.append(p("H is the number of steps that a method looks ahead through its model, or along its records; H = 0 is ",
      "its parent without a model. Areas are means of the return over the steps."),
      element("div", { class: "controls" }, choice("Task", tasks, state.task, (task) => change({ task }))));
    for (const [suite, { end, studies }] of Object.entries(data.tasks[state.task].horizons)) {
      root.append(heading(2, `Suite ${suite}, ${numeral(end)} steps`));
      const lines = Object.entries(studies).map(([name, study], i) => overHorizons(name, study.rows, i));
      curves(lines, `area over H of ${taskName(state.task)}`, "horizon H", "area under the curve", false);
      root.append(p(lines.map((line) => element("span", { class: "entry" }, swatch(line), line.name))));
      Object.values(studies).forEach((study, i) => horizonTable(study, lines[i]));
    }
  }

  // The areas of a study as a line: a run is the n-th of every horizon.
  function overHorizons(name, rows, i) {
    const most = Math.max(...rows.map((row) => row.values.length)), full = rows.every((row) => row.mean !== undefined);
    const runs = Array.from({ length: most }, (_, seed) => rows.map((row) => row.values[seed] ?? null));
    const column = (key) => full ? { [key]: rows.map((row) => row[key]) } : {};
    const line = { name, ...style(i), steps: rows.map((row) => row.horizon), runs, seeds: runs.map((_, seed) => seed + 1) };
    return { ...line, each: "run", ...column("mean"), ...column("low"), ...column("high") };
  }

  function horizonTable({ rows, answer }, line) {
    const seen = range(rows.map((row) => row.values));
    const cells = rows.map((row) => [
      `H\u00a0=\u00a0${row.horizon}`, strip(row, null, seen, line.colour), String(row.seeds), row.text, row.bounds ?? "",
      row.difference ?? "", row.verdict ? badge(row.verdict) : "",
    ]);
    const heads = ["H", scaleHead("area", seen), "seeds", "mean ± deviation", "95 % interval", "minus H = 0", "verdict"];
    root.append(heading(3, swatch(line), line.name), element("p", { class: "answer" }, element("strong", {}, answer)),
      table(heads, cells));
  }

  // ---------------------------------------------------------------- claims

  // An interval on a line with what it is compared to: a point, or a margin around it.
  function interval({ estimate, low, high, zero, margin, text }) {
    const [least, most] = range([estimate, low, high, zero - margin, zero + margin]);
    const share = (value) => most > least ? 4 + 92 * (value - least) / (most - least) : 50;
    const at = (value) => `${share(value)}%`;
    const parts = [element("line", { x1: at(zero), x2: at(zero), y1: 0, y2: "100%", "stroke-dasharray": "3 3" })];
    if (margin) {
      const width = `${share(zero + margin) - share(zero - margin)}%`;
      parts.push(element("rect", { x: at(zero - margin), width, y: 0, height: "100%", stroke: "none", opacity: 0.12 }));
    }
    if (low !== null) parts.push(element("line", { x1: at(low), x2: at(high), y1: "50%", y2: "50%", "stroke-width": 3 }));
    parts.push(element("circle", { cx: at(estimate), cy: "50%", r: 5 }));
    const said = `${text}, compared with ${numeral(zero)}${margin ? ` ± ${numeral(margin)}` : ""}`;
    return element("svg", { role: "img", "aria-label": said, fill: "currentColor", stroke: "currentColor" }, parts);
  }

  const termName = ({ weight, name, task }) =>
    `${String(weight).replace("-", "−")} × ${name}${task ? ` on ${taskName(task)}` : ""}`;

  function drawCase(found) {
    const parts = [p(`${found.about}: `, badge(found.verdict))];
    if (found.seeds) {
      const compared = { above: "above", below: "below", equal: "equal to" }[found.expect];
      const zero = `${numeral(found.zero)}${found.margin ? ` ± ${numeral(found.margin)}` : ""}`;
      const seen = range(found.terms.map((term) => term.values));
      const rows = found.terms.map((term) => [
        termName(term), strip(term, term.seeds, seen), String(term.values.length), term.values.map(numeral).join(", "),
      ]);
      parts.push(p(`${found.text}, n = ${found.seeds}; claimed: ${compared} ${zero}`), interval(found),
        table(["term", scaleHead(found.asked, seen), "seeds", "one number per seed"], rows));
    } else {
      parts.push(note(`Asks for ${found.terms.map(termName).join(", ")}: ${found.asked}.`));
    }
    const measured = found.terms.filter((term) => term.method);
    for (const task of new Set(measured.map((term) => term.task))) {
      const methods = [...new Set(measured.filter((term) => term.task === task).map((term) => term.method))];
      parts.push(p(link(address({ view: "curves", task, methods }), `Curves of ${taskName(task)} behind it`)));
    }
    for (const file of new Set(found.terms.map((term) => term.file).filter(Boolean))) {
      parts.push(note("Table: ", element("code", {}, `docs/results/${file}`)));
    }
    return element("div", { class: "case" }, parts);
  }

  function drawClaim(claim) {
    const body = element("div"), open = state.claim === claim.id;
    const fill = () => body.childElementCount || body.append(
      note(`${data.papers[claim.paper]}; ${claim.source}${claim.suite ? `; suite ${claim.suite}` : ""}`),
      claim.note ? p(code(claim.note)) : "", ...claim.cases.map(drawCase),
      claim.cases.length ? "" : note("No case of it is measured."),
      claim.figure ? p(link(`figures/${claim.figure}`, "Figure")) : "");
    if (open) fill();
    const toggled = ({ target }) => {
      if (target.open) fill();
      if (!target.open && state.claim !== claim.id) return;  // another one was opened since
      state.claim = target.open ? claim.id : "";
      history.replaceState(null, "", address(state));
    };
    const summary = [element("strong", {}, claim.id), " ", badge(claim.verdict), " ", code(claim.statement)];
    const attributes = { id: `claim-${claim.id}`, open, ontoggle: toggled };
    return element("details", attributes, element("summary", {}, summary.flat()), body);
  }

  function drawClaims() {
    const count = (verdict) => data.claims.filter((claim) => claim.verdict === verdict).length;
    const found = [...new Set(data.claims.map((claim) => claim.verdict))].sort();
    const verdicts = Object.fromEntries(found.map((verdict) => [verdict, `${verdict} (${count(verdict)})`]));
    root.append(element("div", { class: "controls" },
      choice("Verdict", { "": `all (${data.claims.length})`, ...verdicts }, state.verdict, (verdict) => change({ verdict })),
      choice("Paper", { "": "all", ...data.papers }, state.paper, (paper) => change({ paper }))),
    note("A case is decided by the 95 % interval of a difference of means over seeds, or of a share of seeds, and by no ",
      "fewer than five seeds; a claim holds if all its cases do. Unfold a claim to see its numbers."));
    const wanted = (claim) => !state.verdict || claim.verdict === state.verdict;
    const papers = Object.keys(data.papers).filter((paper) => !state.paper || paper === state.paper);
    const groups = papers.map((paper) => [paper, data.claims.filter((claim) => claim.paper === paper && wanted(claim))]);
    for (const [paper, claims] of groups) {
      if (claims.length) root.append(heading(2, data.papers[paper]), ...claims.map(drawClaim));
    }
    if (!groups.some(([, claims]) => claims.length)) {
      root.append(element("p", { role: "status" }, "No claim of this paper has this verdict."));
    }
  }

  // ---------------------------------------------------------------- drawing

  const DRAW = { curves: drawCurves, horizon: drawHorizons, claims: drawClaims };
  const nameOf = (control) => control.id || control.closest("label")?.firstChild.textContent;

  function draw() {
    const focused = root.contains(document.activeElement) && nameOf(document.activeElement);
    for (const { plot } of plots) plot.destroy();
    plots = [];
    const views = Object.entries(VIEWS).filter(([view]) => view !== "claims" || data.claims.length);
    root.replaceChildren(element("nav", { class: "views", "aria-label": "Views" }, views.map(([view, text]) =>
      element("a", { href: address({ ...state, view }), "aria-current": view === state.view && "page" }, text))));
    DRAW[state.view]();
    if (focused) {  // whoever works with the keyboard goes on where they were
      const controls = [...root.querySelectorAll("input, button, select")];
      controls.find((control) => nameOf(control) === focused)?.focus({ preventScroll: true });
    }
    requestAnimationFrame(() => root.dataset.drawn = Math.round(performance.now()));  // since the page was asked for
  }

  function follow() {
    state = parse(location.hash);
    draw();
    if (state.claim) document.getElementById(`claim-${state.claim}`)?.scrollIntoView({ behavior: "instant" });
  }

  const repaint = () => plots.forEach(({ plot }) => plot.redraw(false, true));
  addEventListener("hashchange", follow);
  addEventListener("resize", () => plots.forEach(({ plot, size }) => plot.setSize(size())));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  new MutationObserver(repaint).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  follow();
})();
