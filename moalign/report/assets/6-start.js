// Numbers first, then the answers, which may have to be unpacked.

function fromAddress(count) {
  for (const [name, most] of [["preference", record.grid.length], ["prompt", count]]) {
    const given = Number(new URLSearchParams(location.hash.slice(1)).get(name) ?? NaN);
    if (Number.isInteger(given) && given >= 0 && given < most) state[name] = given;
  }
}

async function start() {
  document.querySelectorAll("table").forEach(sortable);
  if (!judged.length) return;
  fromAddress(Infinity);
  axes();
  legend();
  families();
  chooser();
  front();
  believed();
  document.documentElement.dataset.ready = "numbers";
  try {
    answers = await unpack();
  } catch (error) {
    $("answers-note").textContent = `The answers cannot be unpacked in this browser (${error}).`;
    return;
  }
  $("s-answers").hidden = !answers.prompts.length;
  if (!answers.prompts.length) return;
  fromAddress(answers.prompts.length);
  state.prompt = Math.min(state.prompt, answers.prompts.length - 1);
  $("answers-note").textContent = answers.note;
  prompts();
  show();
  front();
  document.documentElement.dataset.ready = "answers";
}

start();
